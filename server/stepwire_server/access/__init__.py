"""The rights of callers: tokens, roles, and the certificates of the server."""

from __future__ import annotations

__all__: list[str] = []
