"""Lifetimes: the ends of things that nobody closes, and the process that made them."""

from __future__ import annotations

__all__: list[str] = []
