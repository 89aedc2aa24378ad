"""What client and server ask of the host that they run on: threads, and memory that processes share."""

from __future__ import annotations

__all__: list[str] = []
