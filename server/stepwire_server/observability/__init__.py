"""The log of a server."""

from __future__ import annotations

__all__: list[str] = []
