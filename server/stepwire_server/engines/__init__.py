"""Engines: where state lives and how a rule is run over it."""

from __future__ import annotations

from stepwire_server.engines.choice import Choice, choose_engines
from stepwire_server.engines.cpu import CpuEngine
from stepwire_server.engines.cuda import CudaEngine, CudaOptions
from stepwire_server.engines.protocol import PARAM, Device, Engine, EngineState, Gradient, HostArray

__all__ = [
    "PARAM",
    "Choice",
    "CpuEngine",
    "CudaEngine",
    "CudaOptions",
    "Device",
    "Engine",
    "EngineState",
    "Gradient",
    "HostArray",
    "choose_engines",
]
