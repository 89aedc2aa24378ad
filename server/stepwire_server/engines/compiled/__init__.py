"""Compiled kernels on disk: their cache, the stock of an image, and the levels of processors."""

from __future__ import annotations

__all__: list[str] = []
