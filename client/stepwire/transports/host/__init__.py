"""Memory of a host that is shared with a server on it."""

from __future__ import annotations

__all__: list[str] = []
