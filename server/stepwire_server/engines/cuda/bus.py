"""Bytes on their way between host and device, through buffers of pinned memory. Unverified on a GPU.

A copy between pageable memory and the device goes through a buffer of the driver, and holds up everything behind it.
So bytes cross in buffers of pinned memory, in two rings: one a direction. The processor copies into a buffer and out
of it. The device copies between the two sides of a buffer, on streams of their own, while kernels run on a third.

A buffer has one owner at a time:

- Up: the thread that acquires a buffer waits for its event, behind which the device has read the last bytes. The thread
  fills the buffer, asks for the copy, records the event, and releases the buffer at once. The next thread waits.
- Down: the kernel writes to the device's side, and `down` copies it to the host's side behind the kernel. The thread
  that asked waits for the copy, copies the bytes out, and releases the buffer only then. So an acquired buffer is idle
  on the device and needs no wait.
- A thread that holds buffers of the way down and finds none free copies its own bytes out first. It never waits for
  other threads while it holds any, so no two threads wait for each other.

Memory that is pinned already (`Bus.pin`) crosses without a buffer. It must stay as it is until the copy is done.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.protocol import HostArray

__all__ = ["Bus", "Crossing", "Crossings"]


class _Buffer:
    """Memory on both sides, and the events of the last work on it."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.host = device.pinned(nbytes)
        self.address: int = self.host.ctypes.data
        self.device = device.allocate(nbytes)
        self.computed = device.event()
        self.idle = device.event()


class _Ring:
    """Buffers that threads acquire and release. Thread-safe."""

    def __init__(self, buffers: list[_Buffer]) -> None:
        self._free = deque(buffers)
        self._released = threading.Condition()

    def acquire(self) -> _Buffer:
        """Wait for a buffer."""
        with self._released:
            self._released.wait_for(lambda: self._free)
            return self._free.popleft()

    def try_acquire(self) -> _Buffer | None:
        """Return a buffer if one is free."""
        with self._released:
            return self._free.popleft() if self._free else None

    def release(self, buffer: _Buffer) -> None:
        """Give a buffer to the next thread."""
        with self._released:
            self._free.append(buffer)
            self._released.notify()


class Crossing:
    """Bytes on their way to the host; see `Pending`."""

    def __init__(self, device: CudaDevice, ring: _Ring, buffer: _Buffer, shift: int, out: HostArray | None) -> None:
        """Copy bytes `[shift, …)` of a buffer into `out` once they have arrived; None if they go there directly."""
        self._device = device
        self._ring = ring
        self._buffer: _Buffer | None = buffer
        self._shift = shift
        self._out = out

    @property
    def ended(self) -> bool:
        """True once `wait` was called."""
        return self._buffer is None

    def wait(self) -> None:
        """See `Pending`."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        try:
            self._device.wait(buffer.idle)
            if self._out is not None:
                self._out[:] = buffer.host[self._shift : self._shift + self._out.nbytes]
        finally:
            self._ring.release(buffer)


class Bus:
    """The way to one device and back. Thread-safe.

    Attributes:
        buffers: the number of buffers each way.
        buffer_bytes: the bytes of each.
    """

    def __init__(self, device: CudaDevice, buffers: int, buffer_bytes: int) -> None:
        """Allocate both rings.

        Raises:
            ResourceExhaustedError: the device has no memory left.
        """
        self.buffers = buffers
        self.buffer_bytes = buffer_bytes
        self._device = device
        self._up = _Ring([_Buffer(device, buffer_bytes) for _ in range(buffers)])
        self._down = _Ring([_Buffer(device, buffer_bytes) for _ in range(buffers)])
        self._pinned: list[tuple[int, int]] = []
        self._pinning = threading.Lock()

    @property
    def device_bytes(self) -> int:
        """The bytes of device memory that the rings hold."""
        return 2 * self.buffers * self.buffer_bytes

    @property
    def pinned_bytes(self) -> int:
        """The bytes of host memory that are pinned by `pin` now."""
        return sum(end - start for start, end in self._pinned)

    def send(self, source: HostArray, target: Any) -> None:
        """Copy bytes to the device, on the stream `up`; the source may change afterwards, unless it is pinned.

        Args:
            source: `(n,) uint8`.
            target: device memory, `(n,) uint8`; no other stream uses it.
        """
        with self._device.current():
            if self._is_pinned(source):
                target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._device.up)
                return
            for low in range(0, source.nbytes, self.buffer_bytes):
                nbytes = min(self.buffer_bytes, source.nbytes - low)
                with self._filled(source[low : low + nbytes]) as buffer:
                    (target.data + low).copy_from_host_async(buffer.address, nbytes, self._device.up)
                    buffer.idle.record(self._device.up)

    def hand(self, source: HostArray, use: Callable[[Any], None]) -> None:
        """Bring bytes to the device and use them there, in the order of the kernels.

        Args:
            source: `(n,) uint8`, at most the bytes of a buffer; may change afterwards.
            use: asks the stream `compute` to use the bytes, `(n,) uint8` on the device.
        """
        device = self._device
        with device.computing(), self._filled(source) as buffer:
            buffer.device.data.copy_from_host_async(buffer.address, source.nbytes, device.up)
            buffer.computed.record(device.up)
            device.compute.wait_event(buffer.computed)
            use(buffer.device[: source.nbytes])
            buffer.idle.record(device.compute)

    def bring(self, shift: int, make: Callable[[Any], None], out: HostArray, own: Callable[[], bool]) -> Crossing:
        """Make bytes on the device and bring them to the host.

        Args:
            shift: the first byte in a buffer, so that the bytes can be aligned as their source is.
            make: asks the stream `compute` to write the bytes to `(n,) uint8` on the device.
            out: the place of the bytes on the host, `(n,) uint8`; with `shift` at most the bytes of a buffer.
            own: waits for the caller's oldest crossing, and returns False where the caller has none.

        Returns:
            The bytes on their way.
        """
        buffer, direct = self._acquire_down(own), self._is_pinned(out)
        try:
            with self._device.computing():
                make(buffer.device[shift : shift + out.nbytes])
                self._ask_down(buffer, shift, out.nbytes, out.ctypes.data if direct else buffer.address + shift)
        except BaseException:
            self._down.release(buffer)
            raise
        return Crossing(self._device, self._down, buffer, shift, None if direct else out)

    @contextlib.contextmanager
    def pin(self, memory: HostArray) -> Iterator[None]:
        """Let the device copy from and to this memory by itself for a block; no copy may be under way at the end.

        Args:
            memory: `(n,) uint8`.
        """
        runtime, pinned = self._device.cupy.cuda.runtime, (memory.ctypes.data, memory.ctypes.data + memory.nbytes)
        with self._device.current():
            runtime.hostRegister(pinned[0], memory.nbytes, 0)
        with self._pinning:
            self._pinned = sorted([*self._pinned, pinned])
        try:
            yield
        finally:
            with self._pinning:
                self._pinned = [other for other in self._pinned if other != pinned]
            with contextlib.suppress(DataLossError), self._device.current():
                runtime.hostUnregister(pinned[0])

    @contextlib.contextmanager
    def _filled(self, source: HostArray) -> Iterator[_Buffer]:
        """Lend a buffer of the way up with these bytes in it; the caller records `idle` behind the use of them."""
        buffer = self._up.acquire()
        try:
            self._device.wait(buffer.idle)
            buffer.host[: source.nbytes] = source
            yield buffer
        finally:
            self._up.release(buffer)

    def _acquire_down(self, own: Callable[[], bool]) -> _Buffer:
        while (buffer := self._down.try_acquire()) is None:
            if not own():
                return self._down.acquire()
        return buffer

    def _ask_down(self, buffer: _Buffer, shift: int, nbytes: int, address: int) -> None:
        buffer.computed.record(self._device.compute)
        self._device.down.wait_event(buffer.computed)
        (buffer.device.data + shift).copy_to_host_async(address, nbytes, self._device.down)
        buffer.idle.record(self._device.down)

    def _is_pinned(self, memory: HostArray) -> bool:
        ranges = self._pinned  # other threads replace the list, and never change one
        if not ranges:
            return False
        address = memory.ctypes.data
        index = bisect_right(ranges, address, key=lambda pinned: pinned[0]) - 1
        return index >= 0 and address + memory.nbytes <= ranges[index][1]


class Crossings:
    """The crossings of one session to the host, oldest first. The session serialises its calls."""

    def __init__(self, bus: Bus) -> None:
        """Start with nothing on its way."""
        self._bus = bus
        self._waiting: deque[Crossing] = deque()

    def bring(self, shift: int, make: Callable[[Any], None], out: HostArray) -> Crossing:
        """See `Bus.bring`. After an error nothing is on its way: the session may never come back for its buffers."""
        while self._waiting and self._waiting[0].ended:
            self._waiting.popleft()
        try:
            crossing = self._bus.bring(shift, make, out, self._wait_for_oldest)
        except BaseException:
            while self._waiting:
                with contextlib.suppress(Exception):
                    self._waiting.popleft().wait()
            raise
        self._waiting.append(crossing)
        return crossing

    def clear(self) -> None:
        """Wait for all, and release their buffers even where the device is lost.

        Raises:
            DataLossError: the device is lost.
        """
        with contextlib.ExitStack() as all_of_them:
            while self._waiting:
                all_of_them.callback(self._waiting.pop().wait)

    def _wait_for_oldest(self) -> bool:
        if not self._waiting:
            return False
        self._waiting.popleft().wait()
        return True
