"""A stand-in for `libcuda.so.1` over the devices of a stand-in for CuPy: what a process opens of another is its memory.

Unlike those of streams, its copies are carried out at once: what a server has not settled is not there.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 3: b"CUDA_ERROR_NOT_INITIALIZED", 100: b"CUDA_ERROR_NO_DEVICE"}
NAMES |= {101: b"CUDA_ERROR_INVALID_DEVICE", 201: b"CUDA_ERROR_INVALID_CONTEXT", 400: b"CUDA_ERROR_INVALID_HANDLE"}
NAMES |= {700: b"CUDA_ERROR_ILLEGAL_ADDRESS", 801: b"CUDA_ERROR_NOT_SUPPORTED"}


class FakeLibcuda:
    """The functions that stepwire calls, and knobs and gauges for tests. Thread-safe.

    Attributes:
        statuses: what functions return instead of doing anything, by name.
        uuids: of the devices; a test may put others there.
        mapped: allocations that are open, by address.
        opened: how often one was opened.
        contexts: how often the primary context of each device is held.
        copied: bytes by direction, "up" and "down".
        synchronized: how often a context was waited for.
        initialized: `cuInit` was called.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.statuses: dict[str, int] = {}
        self.uuids = [bytes([index]) + b"\0pretended-gpu" + b"\xff" for index in range(driver.device_count)]
        self.mapped: dict[int, Any] = {}
        self.opened = 0
        self.contexts = [0] * driver.device_count
        self.copied = {"up": 0, "down": 0}
        self.synchronized = 0
        self.initialized = False
        self._lock = threading.RLock()
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        """Find a function; ctypes says the same of those that a library lacks."""
        function = type(self).__dict__.get(f"_{name}")
        if function is None:
            raise AttributeError(f"function '{name}' not found")

        def call(*arguments: Any) -> int:
            if name in self.statuses:
                return self.statuses[name]
            if not self.initialized and name not in ("cuInit", "cuGetErrorName"):
                return 3
            with self._lock:
                status: int | None = function(self, *arguments)
                return status or 0

        return call

    # --- devices

    def _cuInit(self, flags: Any) -> int:
        assert flags.value == 0
        self.initialized = True
        return 0 if self.uuids else 100

    def _cuGetErrorName(self, status: Any, name: Any) -> int:
        name._obj.value = NAMES.get(status.value)
        return 0 if status.value in NAMES else 1

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.uuids)

    def _cuDeviceGet(self, device: Any, index: Any) -> int:
        device._obj.value = index.value
        return 0 if 0 <= index.value < len(self.uuids) else 101

    def _cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> None:
        ctypes.memmove(uuid._obj, self.uuids[device.value], 16)

    def _cuDeviceGetUuid(self, uuid: Any, device: Any) -> None:
        ctypes.memmove(uuid._obj, self.uuids[device.value], 16)

    # --- contexts

    def _cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, active: Any) -> None:
        active._obj.value = int(self.contexts[device.value] > 0)

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        self.contexts[device.value] += 1
        context._obj.value = 0x1000 + device.value

    def _cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        assert self.contexts[device.value] > 0
        self.contexts[device.value] -= 1

    def _cuCtxPushCurrent_v2(self, context: Any) -> int:
        device = context.value - 0x1000
        self._stack().append(device)
        return 0 if self.contexts[device] else 201

    def _cuCtxPopCurrent_v2(self, context: Any) -> None:
        context._obj.value = 0x1000 + self._stack().pop()

    def _cuCtxSynchronize(self) -> None:
        assert self._stack(), "no context is current"
        self.synchronized += 1

    # --- memory

    def _cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:
        start, size, device = struct.unpack("<QQQ", bytes(handle.reserved)[:24])
        assert flags.value == 1
        if self._stack()[-1] != device:
            return 400
        with self._driver.lock:
            self.mapped[start] = self._driver.memories.on_device(device, start, size)
        self.opened += 1
        address._obj.value = start
        return 0

    def _cuIpcGetMemHandle(self, handle: Any, address: Any) -> None:
        ctypes.memmove(handle._obj.reserved, self._driver.share(address.value), 64)

    def _cuIpcCloseMemHandle(self, address: Any) -> int:
        if (closed := self.mapped.pop(address.value, None)) is None:
            return 1
        assert self._stack()[-1] == closed.device
        if not closed.live:
            self._driver.memories.faults.append(f"{closed} freed while another process maps it")
        return 0

    def _cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:
        self.copied["up"] += size.value
        return self._copy(target.value, source.value, size.value, target.value)

    def _cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:
        self.copied["down"] += size.value
        return self._copy(target.value, source.value, size.value, source.value)

    def _copy(self, target: int, source: int, size: int, on_device: int) -> int:
        assert self._stack(), "no context is current"
        if not any(held.live and held.contains(on_device, size) for held in self.mapped.values()):
            return 700
        ctypes.memmove(target, source, size)
        return 0

    def _stack(self) -> list[int]:
        stack: list[int] = self._thread.__dict__.setdefault("contexts", [])
        return stack
