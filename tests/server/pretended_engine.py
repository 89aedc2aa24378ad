"""Devices for tests of placement: host memory under any device's name."""

from __future__ import annotations

from stepwire_server.engines import CpuEngine, DeviceInfo


class PretendedEngine(CpuEngine):
    """The CPU's arrays and kernels, said to be of another device.

    Attributes:
        closed: how often it was closed.
    """

    def __init__(self, name: str, memory_bytes: int = 1 << 30) -> None:
        super().__init__(threads=1, use_numba=False)
        self._pretended = DeviceInfo(name, f"Pretended {name}", memory_bytes)
        self.closed = 0

    @property
    def device(self) -> DeviceInfo:
        return self._pretended

    def close(self) -> None:
        self.closed += 1
        super().close()
