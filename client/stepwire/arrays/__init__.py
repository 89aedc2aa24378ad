"""A user's arrays: checks, names, packing into flat chunks, and error feedback."""

from __future__ import annotations

__all__: list[str] = []
