"""One step on the server: its gradient, its check, its update and its reply."""

from __future__ import annotations

__all__: list[str] = []
