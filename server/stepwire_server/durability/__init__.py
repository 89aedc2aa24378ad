"""Durable state: the log of steps, checkpoints, epochs, and what is kept of them."""

from __future__ import annotations

__all__: list[str] = []
