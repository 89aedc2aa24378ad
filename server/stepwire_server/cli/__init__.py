"""The command `stepwire`."""

from __future__ import annotations

__all__: list[str] = []
