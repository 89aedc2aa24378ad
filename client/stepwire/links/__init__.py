"""The link of a session to its server: the seam that `Session` speaks through."""

from __future__ import annotations

__all__: list[str] = []
