"""Shards placed, watched and restarted by Ray; loaded by `stepwire cluster` alone."""

from __future__ import annotations

__all__: list[str] = []
