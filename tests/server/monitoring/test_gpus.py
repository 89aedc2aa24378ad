"""The loads of GPUs, from a driver that is pretended, and none where there is no driver."""

from __future__ import annotations

import types
from typing import Any

from stepwire_server.monitoring.gpus import GpuLoad, Gpus


def driver(count: int, lost: int | None = None) -> Any:
    """Pretend to be `pynvml` with so many GPUs, of which one is lost."""

    def memory(index: int) -> Any:
        if index == lost:
            raise RuntimeError("GPU is lost")
        return types.SimpleNamespace(used=1000 * (index + 1), free=500, total=2000)

    return types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetUtilizationRates=lambda index: types.SimpleNamespace(gpu=75, memory=10),
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}".encode(),
    )


def test_each_gpu_tells_its_memory_and_its_use() -> None:
    assert Gpus(driver(2)).loads() == [GpuLoad("GPU-0", 1000, 500, 0.75), GpuLoad("GPU-1", 2000, 500, 0.75)]


def test_a_lost_gpu_is_left_out() -> None:
    assert Gpus(driver(3, lost=1)).loads() == [GpuLoad("GPU-0", 1000, 500, 0.75), GpuLoad("GPU-2", 3000, 500, 0.75)]


def test_without_a_driver_there_is_none() -> None:
    def broken() -> None:
        raise OSError("libnvidia-ml.so.1")

    assert Gpus(types.SimpleNamespace(nvmlInit=broken)).loads() == []
