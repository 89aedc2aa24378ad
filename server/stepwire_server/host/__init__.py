"""Services of the operating system: sockets, sealed memory, the heap, limits and the parent process."""

from __future__ import annotations

__all__: list[str] = []
