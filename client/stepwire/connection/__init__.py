"""One connection to a server: calls, streams, deadlines and repetition."""

from __future__ import annotations

__all__: list[str] = []
