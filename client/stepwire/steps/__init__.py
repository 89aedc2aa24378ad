"""One step on the client: built, sent, and its reply read."""

from __future__ import annotations

__all__: list[str] = []
