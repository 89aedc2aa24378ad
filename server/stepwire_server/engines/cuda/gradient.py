"""One step's gradient in GPU memory, and the memory that is kept for the next. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any, Final, NamedTuple

import numpy as np

from stepwire.errors import DataLossError
from stepwire.wire.int8_blocks import BLOCK, INT8
from stepwire_server.engines.cuda.bus import Bus
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.ipc_memory import DeviceArray
from stepwire_server.engines.cuda.sums import UnreadFigures
from stepwire_server.engines.payloads import check_range, count_of
from stepwire_server.engines.protocol import HostArray

__all__ = ["CudaChunk", "CudaGradient", "GradientCache"]

# A client that is silent in the middle of a step keeps room for as many results from others. One is enough: the sum of
# a chunk is done by the time the next chunk has come.
_UNREAD_SUMS: Final = 1

# The first byte of the codes in a block.
_CODES: Final = INT8.itemsize - BLOCK


class _Block:
    """Device memory for a gradient.

    Attributes:
        memory: `(n,) uint8`.
        uploaded: recorded on `up` behind its last chunk.
        idle: recorded on `compute` behind the last kernel that reads it.
    """

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.memory = device.allocate(nbytes)
        self.uploaded, self.idle = device.event(), device.event()


class _Orphan(NamedTuple):
    """The resources of a gradient that was collected and not closed."""

    block: _Block | None
    unread: UnreadFigures


class GradientCache:
    """Memory of gradients. Up to some bytes outlive their step, because allocating lasts longer than a small step.

    Thread-safe. A finaliser may run in any thread, in the middle of any method, so it calls `abandon` alone: a lock
    taken there may be held by the very thread that it interrupts.

    Attributes:
        most_bytes: the bytes that are kept at most.
        keeps_newest: the newest memory is kept even if it has more bytes, so that a large gradient is not allocated
            and freed in every step.
    """

    def __init__(self, device: CudaDevice, most_bytes: int, keeps_newest: bool = False) -> None:
        """Keep at most `most_bytes` that no step uses."""
        self._device = device
        self.most_bytes = most_bytes
        self.keeps_newest = keeps_newest
        self._kept: deque[_Block] = deque()
        self._lent: set[_Block] = set()  # so that the collector of a gradient's cycle does not collect its memory too
        self._orphans: deque[_Orphan] = deque()
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """The bytes that no step uses now."""
        with self._lock:
            return self._held_bytes()

    def acquire(self, nbytes: int) -> _Block:
        """Return memory of exactly this size, to which `up` may write.

        Raises:
            ResourceExhaustedError: the device has no memory left.
        """
        self._bury()
        with self._lock:
            found = next((block for block in self._kept if block.memory.nbytes == nbytes), None)
            if found is not None:
                self._kept.remove(found)
        if found is None:
            found = _Block(self._device, nbytes)
        else:
            with self._device.current():
                self._device.up.wait_event(found.idle)
        self._lent.add(found)
        return found

    def release(self, block: _Block) -> None:
        """Keep memory for the next step; kernels may still be reading it."""
        self._lent.discard(block)
        with self._device.current():
            self._device.compute.wait_event(block.uploaded)
            block.idle.record(self._device.compute)
        with self._lock:
            self._kept.append(block)
            surplus = self._surplus()
        self._drop(surplus)

    def trim(self) -> None:
        """Give all memory that no step uses back to the device."""
        self._bury()
        with self._lock:
            surplus, self._kept = list(self._kept), deque()
        self._drop(surplus)

    def abandon(self, block: _Block | None, unread: UnreadFigures) -> None:
        """Leave the resources of a gradient to the next call of another method; takes no lock and waits for nothing."""
        self._orphans.append(_Orphan(block, unread))

    def close_gradient(self, block: _Block | None, unread: UnreadFigures) -> None:
        """Wait until nothing is on its way to or from a gradient, and release its memory.

        Raises:
            DataLossError: the device is lost, and the memory with it.
        """
        try:
            if block is not None:
                self._device.wait(block.uploaded)
        finally:
            try:
                unread.clear()
            finally:
                if block is not None:
                    self.release(block)

    def _bury(self) -> None:
        """Close gradients that nobody closed."""
        while self._orphans:
            with contextlib.suppress(IndexError, DataLossError):  # another thread was faster, or the device is lost
                self.close_gradient(*self._orphans.popleft())

    def _surplus(self) -> list[_Block]:
        """Remove the oldest blocks beyond the bytes that are kept."""
        surplus, total = [], self._held_bytes()
        while total > self.most_bytes and len(self._kept) > self.keeps_newest:
            surplus.append(self._kept.popleft())
            total -= surplus[-1].memory.nbytes
        return surplus

    def _held_bytes(self) -> int:
        return sum(int(block.memory.nbytes) for block in self._kept)

    def _drop(self, blocks: list[_Block]) -> None:
        """Zero memory before it goes back to the device; a device that is lost has none any more."""
        with contextlib.suppress(DataLossError):
            for block in blocks:
                self._device.zero(block.memory)
                with self._device.current():
                    block.idle.record(self._device.compute)
                self._device.wait(block.idle)


class CudaChunk:
    """A chunk on the device, in the memory of its gradient or of a client; see `Gradient`.

    Attributes:
        dtype: the wire dtype.
        address: the address of the first element; of blocks, of the first block.
        gradient: the gradient that the chunk belongs to.
    """

    __slots__ = ("_count", "_memory", "address", "dtype", "gradient")

    def __init__(self, dtype: np.dtype[Any], address: int, count: int, memory: Any, gradient: CudaGradient) -> None:
        """Keep a chunk of `count` elements, and the allocation that holds it."""
        self.dtype = dtype
        self.address = address
        self.gradient = gradient
        self._count = count
        self._memory = memory

    def __len__(self) -> int:
        """Count the elements."""
        return self._count

    def window(self, begin: int) -> tuple[int, tuple[int, ...]]:
        """Return the elements from `begin` on as arguments of kernels: their address, and for blocks the first's place.

        The address is then that of the first element's code.
        """
        if self.dtype != INT8:
            return self.address + begin * self.dtype.itemsize, ()
        block, place = divmod(begin, BLOCK)
        return self.address + block * INT8.itemsize + _CODES + place, (place,)


class CudaGradient:
    """One step's gradient; see `GradientBuffer`. Chunks lie where their elements do in flat space.

    So a chunk is aligned as the state is, and memory is allocated once for all chunks. Blocks of 8 bits stay as they
    are. A chunk of exported memory stays in its place.

    Attributes:
        unread: the sums of its chunks that nobody has read.
    """

    def __init__(self, device: CudaDevice, bus: Bus, cache: GradientCache, size: int) -> None:
        """Prepare for `size` elements; their dtype is that of the first chunk."""
        self.unread = UnreadFigures(_UNREAD_SUMS)
        self._device = device
        self._bus = bus
        self._cache = cache
        self._size = size
        self._block: _Block | None = None
        self._base = 0

    def put(self, offset: int, payload: HostArray, count: int | None = None) -> CudaChunk:
        """See `GradientBuffer.put`."""
        count, dtype = count_of(payload, count), payload.dtype
        check_range("gradient", offset, offset + count, self._size)
        if isinstance(payload, DeviceArray):
            return CudaChunk(dtype, payload.address, count, payload.owner, self)
        wide = BLOCK if dtype == INT8 else 1
        assert offset % wide == 0
        block = self._block or self._begin(-(-self._size // wide) * dtype.itemsize)
        address = self._base + offset // wide * dtype.itemsize
        items = -(-count // wide)
        assert address + items * dtype.itemsize <= self._base + block.memory.nbytes  # all are of the first one's dtype
        device = self._device
        with device.current():
            try:
                self._bus.send(payload[:items], address)
            finally:  # copies asked for before an error may still be on their way
                block.uploaded.record(device.up)
            device.compute.wait_event(block.uploaded)
        return CudaChunk(dtype, address, count, block, self)

    def _begin(self, nbytes: int) -> _Block:
        self._block = block = self._cache.acquire(nbytes)
        self._base = block.memory.data.ptr
        return block

    def close(self) -> None:
        """See `GradientBuffer.close`; pinned chunks may change afterwards."""
        block, self._block = self._block, None
        self._cache.close_gradient(block, self.unread)

    def __del__(self) -> None:
        """Leave the resources of a gradient that nobody closed to the cache."""
        if self._block is not None or not self.unread.empty:
            self._cache.abandon(self._block, self.unread)
