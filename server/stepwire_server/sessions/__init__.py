"""Sessions: their state, their ledger, the holders of their workers, and the registry of all."""

from __future__ import annotations

__all__: list[str] = []
