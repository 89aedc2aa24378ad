"""Engines: the memory of state, and the kernels that run a rule over it."""

from __future__ import annotations

from stepwire_server.engines.choice import Choice, choose_engines
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.cuda import CudaEngine, CudaOptions
from stepwire_server.engines.protocol import PARAM, DeviceInfo, Engine, EngineState, Gradient, HostArray

__all__ = [
    "PARAM",
    "Choice",
    "CpuEngine",
    "CudaEngine",
    "CudaOptions",
    "DeviceInfo",
    "Engine",
    "EngineState",
    "Gradient",
    "HostArray",
    "choose_engines",
]
