"""The memory and the use of this machine's GPUs, as the driver tells them by nvidia-ml-py, where it is installed."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import structlog

__all__ = ["GpuLoad", "Gpus"]

_log = structlog.get_logger()


class GpuLoad(NamedTuple):
    """One GPU at one moment.

    Attributes:
        uuid: the id that the driver gives it, which CUDA_VISIBLE_DEVICES does not change.
        used_bytes: the memory in use, by all processes.
        free_bytes: the memory that is free.
        use: the portion of the last sample period in which a kernel ran, in [0, 1].
    """

    uuid: str
    used_bytes: int
    free_bytes: int
    use: float


class Gpus:
    """The GPUs that the driver knows; none where nvidia-ml-py, the driver or a GPU is missing."""

    def __init__(self, nvml: Any = None) -> None:
        """Find the GPUs; `nvml` takes the place of the module `pynvml`."""
        self._handles: list[Any] = []
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except Exception as problem:  # an installation may raise anything, and metrics do without
            _log.info("no metrics of GPUs", problem=str(problem))

    def loads(self) -> list[GpuLoad]:
        """Return the load of each GPU that answers."""
        found = []
        for handle in self._handles:
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                use = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                found.append(GpuLoad(_text(self._nvml.nvmlDeviceGetUUID(handle)), memory.used, memory.free, use))
            except Exception as problem:  # a GPU may be lost while others go on
                _log.debug("a GPU tells no load", problem=str(problem))
        return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
