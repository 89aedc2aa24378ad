"""The description of an engine's device, and the engine's numbers at one moment."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DeviceInfo", "EngineStatistics"]


class DeviceInfo(NamedTuple):
    """The description of a device.

    Attributes:
        name: `"cpu"` or `"cuda:0"`.
        description: the processor or GPU, in words.
        memory_bytes: its memory: all of a processor's, and of a GPU's the memory free when the engine started.
        working_bytes: the memory that the engine itself holds at most, besides sessions and their gradients.
    """

    name: str
    description: str
    memory_bytes: int
    working_bytes: int = 0


class EngineStatistics(NamedTuple):
    """The memory and the threads of an engine at one moment.

    Attributes:
        allocated_bytes: the bytes of all state that is allocated, loads that are not committed included.
        kept_gradient_bytes: the device memory of past gradients that is kept for the next step.
        working_bytes: the device memory that the engine itself holds at most; see `DeviceInfo`.
        threads: the number of threads of the processor that work on one call, the caller's included.
        code_bytes: the machine code of kernels in device memory.
        taken_bytes: the device memory that contexts, this process's included, had at the engine's start.
    """

    allocated_bytes: int
    kept_gradient_bytes: int
    working_bytes: int
    threads: int
    code_bytes: int = 0
    taken_bytes: int = 0
