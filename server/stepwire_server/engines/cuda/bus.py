"""Bytes on their way between host and device, through slots of pinned memory. Unverified on a GPU.

A copy between pageable memory and the device goes through a buffer of the driver's and holds up everything behind it.
So bytes cross in slots of two rings, one a direction, of pinned memory: into a slot and out of it the processor copies,
between slot and device the device does, on streams of their own, while kernels run on a third.

Who owns a slot, and until when:

- Up: the thread that takes a slot waits for the slot's event (the device has read what was in it before), fills it,
  asks for the copy, records the event behind it, and gives the slot back at once. Whoever takes it next waits.
- Down: the kernel writes to the slot's device memory; `down` waits for the kernel and copies to its host memory; the
  thread that asked waits for the copy, takes the bytes, and only then gives the slot back. So a slot that is taken is
  idle on the device, and needs no wait.
- A thread that holds slots of the way down and finds none free takes its own bytes first, and never waits for others
  while it holds any: so no two can wait for each other.

Memory that is pinned already (`Bus.pin`) crosses without a slot. It must stay as it is until what was asked for is
done.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.protocol import HostArray

__all__ = ["Bus", "Crossing", "Crossings"]


class _Slot:
    """Memory on both sides, and the last thing that was asked of it."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.host = device.pinned(nbytes)
        self.address: int = self.host.ctypes.data
        self.device = device.allocate(nbytes)
        self.computed = device.event()
        self.idle = device.event()


class _Ring:
    """Slots that threads take and give back. Thread-safe."""

    def __init__(self, slots: list[_Slot]) -> None:
        self._free = deque(slots)
        self._given = threading.Condition()

    def take(self) -> _Slot:
        """Wait for a slot."""
        with self._given:
            self._given.wait_for(lambda: self._free)
            return self._free.popleft()

    def try_take(self) -> _Slot | None:
        """Take a slot if there is one."""
        with self._given:
            return self._free.popleft() if self._free else None

    def give(self, slot: _Slot) -> None:
        """Give a slot back."""
        with self._given:
            self._free.append(slot)
            self._given.notify()


class Crossing:
    """Bytes on their way to the host; see `Pending`."""

    def __init__(self, ring: _Ring, slot: _Slot, shift: int, out: HostArray | None) -> None:
        """Take bytes `[shift, …)` of a slot into `out`, if they did not go there by themselves."""
        self._ring = ring
        self._slot: _Slot | None = slot
        self._shift = shift
        self._out = out

    @property
    def taken(self) -> bool:
        """Somebody has waited for it."""
        return self._slot is None

    def wait(self) -> None:
        """See `Pending`."""
        slot, self._slot = self._slot, None
        if slot is None:
            return
        try:
            slot.idle.synchronize()
            if self._out is not None:
                self._out[:] = slot.host[self._shift : self._shift + self._out.nbytes]
        finally:
            self._ring.give(slot)


class Bus:
    """The way to one device and back. Thread-safe.

    Attributes:
        slots: how many there are each way.
        slot_bytes: the bytes of each.
    """

    def __init__(self, device: CudaDevice, slots: int, slot_bytes: int) -> None:
        """Allocate both rings.

        Raises:
            ResourceExhaustedError: the device has no memory left.
        """
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._device = device
        self._up = _Ring([_Slot(device, slot_bytes) for _ in range(slots)])
        self._down = _Ring([_Slot(device, slot_bytes) for _ in range(slots)])
        self._pinned: list[tuple[int, int]] = []
        self._pinning = threading.Lock()

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that the rings hold."""
        return 2 * self.slots * self.slot_bytes

    def send(self, source: HostArray, target: Any) -> None:
        """Copy bytes to the device, on the stream `up`; the source may change afterwards, unless it is pinned.

        Args:
            source: `(n,) uint8`.
            target: device memory, `(n,) uint8`, that nothing asked of other streams uses.
        """
        with self._device.current():
            if self._is_pinned(source):
                target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._device.up)
                return
            for low in range(0, source.nbytes, self.slot_bytes):
                with self._filled(source[low : low + self.slot_bytes]) as slot:
                    part = target.data + low
                    part.copy_from_host_async(slot.address, min(self.slot_bytes, source.nbytes - low), self._device.up)
                    slot.idle.record(self._device.up)

    def hand(self, source: HostArray, use: Callable[[Any], None]) -> None:
        """Bring bytes to the device and use them there, in the order of the kernels.

        Args:
            source: `(n,) uint8`, at most a slot's bytes; may change afterwards.
            use: asks the stream `compute` for what is to be done with the bytes, `(n,) uint8` on the device.
        """
        device = self._device
        with device.computing(), self._filled(source) as slot:
            slot.device.data.copy_from_host_async(slot.address, source.nbytes, device.up)
            slot.computed.record(device.up)
            device.compute.wait_event(slot.computed)
            use(slot.device[: source.nbytes])
            slot.idle.record(device.compute)

    def bring(self, shift: int, make: Callable[[Any], None], out: HostArray, own: Callable[[], bool]) -> Crossing:
        """Make bytes on the device and bring them to the host.

        Args:
            shift: where in a slot they begin, so that they can be aligned as their source is.
            make: asks the stream `compute` to write them to `(n,) uint8` on the device.
            out: where they go, `(n,) uint8`; with `shift` at most a slot's bytes.
            own: waits for the caller's oldest crossing, if it has any, and tells whether it had.
        """
        slot, direct = self._take_down(own), self._is_pinned(out)
        try:
            with self._device.computing():
                make(slot.device[shift : shift + out.nbytes])
                self._ask_down(slot, shift, out.nbytes, out.ctypes.data if direct else slot.address + shift)
        except BaseException:
            self._down.give(slot)
            raise
        return Crossing(self._down, slot, shift, None if direct else out)

    @contextlib.contextmanager
    def pin(self, memory: HostArray) -> Iterator[None]:
        """Let the device copy from and to this memory itself for a block; nothing may be asked of it at the end.

        Args:
            memory: `(n,) uint8`.
        """
        runtime, span = self._device.cupy.cuda.runtime, (memory.ctypes.data, memory.ctypes.data + memory.nbytes)
        with self._device.current():
            runtime.hostRegister(span[0], memory.nbytes, 0)
        with self._pinning:
            self._pinned = sorted([*self._pinned, span])
        try:
            yield
        finally:
            with self._pinning:
                self._pinned = [other for other in self._pinned if other != span]
            with self._device.current():
                runtime.hostUnregister(span[0])

    @contextlib.contextmanager
    def _filled(self, source: HostArray) -> Iterator[_Slot]:
        """Lend a slot of the way up with these bytes in it; `idle` must be recorded behind what is done with them."""
        slot = self._up.take()
        try:
            slot.idle.synchronize()
            slot.host[: source.nbytes] = source
            yield slot
        finally:
            self._up.give(slot)

    def _take_down(self, own: Callable[[], bool]) -> _Slot:
        while (slot := self._down.try_take()) is None:
            if not own():
                return self._down.take()
        return slot

    def _ask_down(self, slot: _Slot, shift: int, nbytes: int, address: int) -> None:
        slot.computed.record(self._device.compute)
        self._device.down.wait_event(slot.computed)
        (slot.device.data + shift).copy_to_host_async(address, nbytes, self._device.down)
        slot.idle.record(self._device.down)

    def _is_pinned(self, memory: HostArray) -> bool:
        spans = self._pinned  # which other threads replace, and never change
        if not spans:
            return False
        address = memory.ctypes.data
        index = bisect_right(spans, address, key=lambda span: span[0]) - 1
        return index >= 0 and address + memory.nbytes <= spans[index][1]


class Crossings:
    """What one session has on its way to the host, oldest first. The session serialises its calls."""

    def __init__(self, bus: Bus) -> None:
        """Start with nothing."""
        self._bus = bus
        self._waiting: deque[Crossing] = deque()

    def bring(self, shift: int, make: Callable[[Any], None], out: HostArray) -> Crossing:
        """See `Bus.bring`. After an error nothing is on its way: who asked for it may not come back for its slots."""
        while self._waiting and self._waiting[0].taken:
            self._waiting.popleft()
        try:
            crossing = self._bus.bring(shift, make, out, self._take_oldest)
        except BaseException:
            while self._waiting:
                with contextlib.suppress(Exception):
                    self._waiting.popleft().wait()
            raise
        self._waiting.append(crossing)
        return crossing

    def clear(self) -> None:
        """Wait for all."""
        while self._take_oldest():
            pass

    def _take_oldest(self) -> bool:
        if not self._waiting:
            return False
        self._waiting.popleft().wait()
        return True
