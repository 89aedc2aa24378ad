"""Traces of steps: chosen by their number or their time, and made of the times that steps have anyway, after them."""

from __future__ import annotations

__all__: list[str] = []
