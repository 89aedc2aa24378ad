"""Several server processes: their settings, their start and their watch."""

from __future__ import annotations

__all__: list[str] = []
