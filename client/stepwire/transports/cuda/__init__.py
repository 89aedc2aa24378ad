"""Memory of a GPU that is shared with a server on the same host. Unverified on a GPU."""

from __future__ import annotations

__all__: list[str] = []
