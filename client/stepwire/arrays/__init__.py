"""A user's arrays: checked, named, packed into flat chunks, and what an encoding took off them."""

from __future__ import annotations

__all__: list[str] = []
