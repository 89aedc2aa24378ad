"""The gradients of several workers, reduced to one."""

from __future__ import annotations

__all__: list[str] = []
