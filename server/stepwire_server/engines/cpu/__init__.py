"""The engine of the CPU: state in host memory, kernels by Numba or NumPy."""

from __future__ import annotations

__all__: list[str] = []
