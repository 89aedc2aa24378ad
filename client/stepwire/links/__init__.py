"""The links of a session and of a client to their servers: the seams that `Session` and `Client` speak through."""

from __future__ import annotations

__all__: list[str] = []
