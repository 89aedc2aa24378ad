"""The engine that keeps state in GPU memory, on CuPy. Unverified on a GPU."""

from __future__ import annotations

from stepwire_server.engines.cuda.engine import CudaEngine, CudaOptions

__all__ = ["CudaEngine", "CudaOptions"]
