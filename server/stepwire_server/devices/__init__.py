"""The devices of a server, each with its budget of bytes."""

from __future__ import annotations

__all__: list[str] = []
