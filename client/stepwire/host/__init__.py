"""The host that client and server run on: threads, and memory that processes share."""

from __future__ import annotations

__all__: list[str] = []
