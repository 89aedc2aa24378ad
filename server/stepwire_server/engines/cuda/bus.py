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
import mmap
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.device import CudaDevice, address_of
from stepwire_server.engines.cuda.pool import Pool
from stepwire_server.engines.protocol import HostArray

__all__ = ["Bus", "Crossing", "Crossings"]

_PAGE_BYTES: Final = mmap.PAGESIZE
_SLICE_BYTES: Final = 64 << 20


class _Buffer:
    """Memory on both sides, and the events of the last work on it.

    Attributes:
        host: the host's side, `(n,) uint8`.
        address: the address of the host's side.
        place: the address of the device's side.
    """

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.host = device.pinned(nbytes)
        self.address = address_of(self.host)
        self._device = device.allocate(nbytes)
        self.place: int = self._device.data.ptr
        self.computed = device.event()
        self.idle = device.event()


class _PinnedRanges:
    """Memory of the host that is pinned, by addresses. Thread-safe: readers see one list or the next, and no lock."""

    def __init__(self) -> None:
        self._ranges: tuple[list[int], list[int]] = ([], [])
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of all ranges."""
        starts, ends = self._ranges
        return sum(ends) - sum(starts)

    def add(self, start: int, end: int) -> None:
        """Begin a range, which touches no other."""
        with self._lock:
            self._replace([*zip(*self._ranges, strict=True), (start, end)])

    def remove(self, start: int, end: int) -> None:
        """End a range."""
        with self._lock:
            self._replace([known for known in zip(*self._ranges, strict=True) if known != (start, end)])

    def hold(self, address: int, nbytes: int) -> bool:
        """Tell whether one range holds all of some memory."""
        starts, ends = self._ranges
        index = bisect_right(starts, address) - 1
        return index >= 0 and address + nbytes <= ends[index]

    def _replace(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = [start for start, _ in sorted(ranges)], [end for _, end in sorted(ranges)]


class Crossing:
    """Bytes on their way to the host; see `Pending`."""

    __slots__ = ("_buffer", "_device", "_out", "_ring", "_shift")

    def __init__(
        self, device: CudaDevice, ring: Pool[_Buffer], buffer: _Buffer, shift: int, out: HostArray | None
    ) -> None:
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
                values = self._out.view(np.uint8)
                values[:] = buffer.host[self._shift : self._shift + values.nbytes]
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
        self._up = Pool([_Buffer(device, buffer_bytes) for _ in range(buffers)])
        self._down = Pool([_Buffer(device, buffer_bytes) for _ in range(buffers)])
        self._pinned = _PinnedRanges()

    @property
    def device_bytes(self) -> int:
        """The bytes of device memory that the rings hold."""
        return 2 * self.buffers * self.buffer_bytes

    @property
    def pinned_bytes(self) -> int:
        """The bytes of host memory that are pinned by `pin` now."""
        return self._pinned.nbytes

    def send(self, source: HostArray, target: int) -> None:
        """Copy an array to the device, on the stream `up`; the source may change afterwards, unless it is pinned.

        Args:
            source: the array, contiguous.
            target: the address of as many bytes on the device; no other stream uses them.
        """
        address, device = address_of(source), self._device
        with device.current():
            if self._pinned.hold(address, source.nbytes):
                device.copy_up(target, address, source.nbytes)
                return
            values = source.view(np.uint8)
            for low in range(0, source.nbytes, self.buffer_bytes):
                nbytes = min(self.buffer_bytes, source.nbytes - low)
                with self._filled(values[low : low + nbytes]) as buffer:
                    device.copy_up(target + low, buffer.address, nbytes)
                    buffer.idle.record(device.up)

    def hand(self, source: HostArray, use: Callable[[int], None]) -> None:
        """Bring bytes to the device and use them there, in the order of the kernels.

        Args:
            source: `(n,) uint8`, at most the bytes of a buffer; may change afterwards.
            use: asks the stream `compute` to use the bytes, given their address on the device.
        """
        device = self._device
        with device.current(), self._filled(source) as buffer:
            device.copy_up(buffer.place, buffer.address, source.nbytes)
            buffer.computed.record(device.up)
            device.compute.wait_event(buffer.computed)
            use(buffer.place)
            buffer.idle.record(device.compute)

    def bring(self, shift: int, make: Callable[[int], None], out: HostArray, own: Callable[[], bool]) -> Crossing:
        """Make bytes on the device and bring them to the host.

        Args:
            shift: the first byte in a buffer, so that the bytes can be aligned as their source is.
            make: asks the stream `compute` to write the bytes, given their address on the device.
            out: the place of the bytes on the host, contiguous; with `shift` at most the bytes of a buffer.
            own: waits for the caller's oldest crossing, and returns False where the caller has none.

        Returns:
            The bytes on their way.
        """
        device, address, nbytes = self._device, address_of(out), out.nbytes
        direct = self._pinned.hold(address, nbytes)
        buffer = self._acquire_down(own)
        try:
            with device.current():
                make(buffer.place + shift)
                buffer.computed.record(device.compute)
                device.down.wait_event(buffer.computed)
                device.copy_down(address if direct else buffer.address + shift, buffer.place + shift, nbytes)
                buffer.idle.record(device.down)
        except BaseException:
            self._down.release(buffer)
            raise
        return Crossing(device, self._down, buffer, shift, None if direct else out)

    @contextlib.contextmanager
    def pin(self, memory: HostArray) -> Iterator[None]:
        """Let the device copy from and to this memory by itself for a block; no copy may be under way at the end.

        A driver that pins gigabytes at once keeps the other threads of the process from the device for as long. So
        memory that begins a page is pinned slice by slice. Bytes of two slices go through buffers.

        Args:
            memory: `(n,) uint8`.
        """
        most = _SLICE_BYTES if address_of(memory) % _PAGE_BYTES == 0 else max(memory.nbytes, 1)
        with contextlib.ExitStack() as pinned:
            for low in range(0, memory.nbytes, most):
                pinned.enter_context(self._pin_slice(memory[low : low + most]))
            yield

    @contextlib.contextmanager
    def _pin_slice(self, memory: HostArray) -> Iterator[None]:
        runtime, start = self._device.cupy.cuda.runtime, address_of(memory)
        with self._device.current():
            runtime.hostRegister(start, memory.nbytes, 0)
        self._pinned.add(start, start + memory.nbytes)
        try:
            yield
        finally:
            self._pinned.remove(start, start + memory.nbytes)
            with contextlib.suppress(DataLossError), self._device.current():
                runtime.hostUnregister(start)

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


class Crossings:
    """The crossings of one session to the host, oldest first. The session serialises its calls."""

    def __init__(self, bus: Bus) -> None:
        """Start with nothing on its way."""
        self._bus = bus
        self._waiting: deque[Crossing] = deque()

    def bring(self, shift: int, make: Callable[[int], None], out: HostArray) -> Crossing:
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

    def arrive(self) -> None:
        """Wait for all, and copy the bytes to their places.

        Raises:
            DataLossError: the device is lost.
        """
        while self._wait_for_oldest():
            pass

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
