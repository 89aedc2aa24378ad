"""Gradients lie in memory that is used again, zeroed before it is given back, and never overwritten too early."""

from __future__ import annotations

import gc
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire_server.engines.cuda.bus import Bus
from stepwire_server.engines.cuda.device import ALIGNMENT, CudaDevice
from stepwire_server.engines.cuda.gradient import CudaChunk, CudaGradient, GradientCache
from stepwire_server.engines.cuda.sums import Cells, Figures
from stepwire_server.engines.payloads import STORED
from tests.server.engines.cuda.filling import Filling, fill

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]
WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
SLOT = 1 << 8

every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


class Device:
    """A device with what gradients need."""

    def __init__(self, cupy: Any, cache_bytes: int = 1 << 20) -> None:
        self.cupy = cupy
        self.device = CudaDevice(cupy, 0)
        self.bus = Bus(self.device, 2, SLOT)
        self.cache = GradientCache(self.device, cache_bytes)
        self.held = cupy.used_bytes

    def gradient(self, size: int) -> CudaGradient:
        return CudaGradient(self.device, self.bus, self.cache, size)

    def put(self, gradient: CudaGradient, value: float, size: int, offset: int = 0) -> CudaChunk:
        return gradient.put(offset, np.full(size, value, np.float32))

    def keep(self, chunk: CudaChunk, target: Any) -> None:
        """Read a chunk in the order of the kernels, as a step does."""
        with self.device.current():
            self.device.copy_across(target.data.ptr, chunk.address, target.nbytes)

    def values(self, chunk: CudaChunk) -> Any:
        """View the elements of a chunk, as they are stored."""
        memory = chunk.gradient._block.memory
        return self.device.view(memory, chunk.address - memory.data.ptr, len(chunk), STORED[chunk.dtype])

    def cached_bytes(self) -> int:
        return self.cupy.used_bytes - self.held


# --- chunks -------------------------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("name", WIRE)
def test_chunks_lie_where_their_elements_do(fake, read, unaligned, order, name) -> None:
    place, dtype, size = Device(fake(order)), WIRE[name], 1000
    gradient = place.gradient(size)
    values = np.random.default_rng(0).standard_normal(size).astype(dtype)
    chunks = [(low, gradient.put(low, unaligned(values[low:high]))) for low, high in [(300, 1000), (0, 7), (7, 300)]]
    base = chunks[1][1].address
    assert base % ALIGNMENT == 0
    for low, chunk in chunks:
        assert (chunk.address - base, chunk.dtype) == (low * dtype.itemsize, dtype)
        got = read(place.device, place.values(chunk)).view(dtype)
        assert (got == values[low : low + len(chunk)]).all()
        assert chunk.gradient is gradient
    assert [len(chunk) for _, chunk in chunks] == [700, 7, 293]
    assert place.cached_bytes() == size * dtype.itemsize, "one allocation, of what it takes"
    gradient.close()


@every_order
def test_a_payload_may_change_as_soon_as_it_is_put(fake, read, order) -> None:
    place = Device(fake(order))
    gradient, payload = place.gradient(500), np.arange(500, dtype=np.float32)
    chunk = gradient.put(0, payload)
    payload[:] = -1.0
    assert (read(place.device, place.values(chunk)) == np.arange(500)).all()
    gradient.close()


@every_order
def test_a_pinned_payload_may_change_after_the_close(fake, read, order) -> None:
    place = Device(fake(order))
    gradient, payload, kept = place.gradient(500), np.arange(500, dtype=np.float32), place.device.allocate(2000)
    with place.bus.pin(payload.view(np.uint8)):
        place.keep(gradient.put(0, payload), kept)
        gradient.close()
        payload[:] = -1.0
    assert (read(place.device, kept).view(np.float32) == np.arange(500)).all()


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, 11), (10, 1), (11, 0)])
def test_chunks_outside_are_refused_before_anything_is_allocated(fake, offset, count) -> None:
    place = Device(fake())
    with pytest.raises(IndexError, match=r"of the gradient are outside its 10"):
        place.gradient(10).put(offset, np.zeros(count, np.float32))
    assert place.cached_bytes() == 0


def test_empty_chunks_are_chunks(fake) -> None:
    place = Device(fake())
    gradient = place.gradient(10)
    assert len(gradient.put(10, np.zeros(0, np.float32))) == 0
    assert place.cached_bytes() == 40
    gradient.close()
    nothing = place.gradient(0)
    assert len(nothing.put(0, np.zeros(0, np.float32))) == 0
    nothing.close()


# --- closing ------------------------------------------------------------------------------------------------------


def test_closing_twice_gives_memory_back_once(fake) -> None:
    place = Device(fake())
    gradient = place.gradient(10)
    place.put(gradient, 1.0, 10)
    gradient.close()
    gradient.close()
    first, second = place.gradient(10), place.gradient(10)
    chunks = [place.put(first, 2.0, 10), place.put(second, 3.0, 10)]
    assert chunks[0].address != chunks[1].address
    first.close()
    second.close()


def test_closing_without_a_chunk_takes_nothing(fake) -> None:
    place = Device(fake())
    place.gradient(10).close()
    assert (place.cached_bytes(), place.cupy.allocations) == (0, 4)


@every_order
def test_what_nobody_closed_is_closed_when_it_is_dropped(fake, order) -> None:
    place = Device(fake(order), cache_bytes=40)
    chunk = place.put(place.gradient(10), 1.0, 10)
    before = place.cupy.allocations
    address = chunk.address
    del chunk
    gc.collect()
    again = place.gradient(10)
    assert place.put(again, 2.0, 10).address == address
    assert (place.cached_bytes(), place.cupy.allocations) == (40, before)
    again.close()


@every_order
def test_sums_are_read_when_the_gradient_is_closed(fake, order) -> None:
    place = Device(fake(order, library=Filling()))
    cells, gradient = Cells(place.device, 32), place.gradient(10)
    place.put(gradient, 1.0, 10)
    with place.device.current():
        sums = [
            Figures(cells, gradient.unread, fill(place.device, 9, 1), np.ndarray.tolist, 1, np.dtype(np.uint8))
            for _ in range(3)
        ]
    gradient.close()
    assert len(cells._cells) == 32
    assert [each.wait() for each in sums] == [[9]] * 3


@every_order
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_chunk_that_fails_half_way_leaves_memory_that_can_be_given_back(fake, read, order, cache_bytes) -> None:
    """Two slots of it may still be on their way: what is kept is theirs until then, and what is dropped too."""
    cupy = fake(order)
    place, broken = Device(cupy, cache_bytes), cupy.cuda.runtime.CUDARuntimeError(98)
    gradient = place.gradient(5 * SLOT // 4)
    cupy.fail_next("copy", broken, after=2)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device function"):
        place.put(gradient, 1.0, 5 * SLOT // 4)
    gradient.close()
    broken.__traceback__ = None  # which holds the chunk
    assert place.cached_bytes() == (5 * SLOT if cache_bytes else 0)
    again = place.gradient(5 * SLOT // 4)
    assert (read(place.device, place.values(place.put(again, 2.0, 5 * SLOT // 4))) == 2.0).all()
    again.close()


def test_a_shortage_while_a_chunk_is_put_can_be_tried_again(fake) -> None:
    place = Device(fake(memory_bytes=4 * SLOT + 100))
    gradient = place.gradient(30)
    with pytest.raises(ResourceExhaustedError, match="for 120 bytes; 100 are free"):
        place.put(gradient, 1.0, 30)
    gradient.close()
    smaller = place.gradient(25)
    assert len(place.put(smaller, 1.0, 25)) == 25
    smaller.close()


# --- memory that is kept ------------------------------------------------------------------------------------------


def test_memory_of_the_same_size_is_used_again(fake) -> None:
    place = Device(fake())
    addresses = []
    for _ in range(5):
        for size in (10, 20):
            gradient = place.gradient(size)
            addresses.append(place.put(gradient, 1.0, size).address)
            gradient.close()
    assert place.cupy.allocations == 4 + 2
    assert addresses == addresses[:2] * 5
    assert place.cached_bytes() == 120


def test_memory_of_another_size_is_not_used(fake) -> None:
    place = Device(fake())
    for size in (10, 9, 11):
        gradient = place.gradient(size)
        place.put(gradient, 1.0, size)
        gradient.close()
    assert (place.cupy.allocations, place.cached_bytes()) == (4 + 3, 120)


@every_order
def test_the_oldest_surplus_goes_and_is_zeroed_first(fake, read, order) -> None:
    place, memories = Device(fake(order), cache_bytes=150), {}
    turns: list[tuple[int, set[int]]] = [(10, {10}), (11, {10, 11}), (12, {10, 11, 12}), (15, {12, 15}), (40, set())]
    for size, kept in turns:
        gradient = place.gradient(size)
        place.put(gradient, float(size), size)
        memories[size] = gradient._block.memory
        gradient.close()
        for known, memory in memories.items():
            expected = [known if known in kept else 0.0] * known
            assert read(place.device, memory).view(np.float32).tolist() == expected
    memories.clear()
    del memory
    assert place.cached_bytes() == 0


@every_order
def test_all_that_no_step_uses_is_zeroed_and_given_back_when_asked(fake, read, order) -> None:
    place, memories = Device(fake(order)), []
    gradients = [place.gradient(size) for size in (10, 11, 12)]
    chunks = [place.put(gradient, 5.0, gradient._size) for gradient in gradients]
    for gradient in gradients[:2]:
        memories.append(gradient._block.memory)
        gradient.close()
    place.cache.trim()
    assert [read(place.device, memory).any() for memory in memories] == [False, False]
    assert (read(place.device, place.values(chunks[2])) == 5.0).all(), "a step uses it"
    del chunks
    memories.clear()
    assert place.cached_bytes() == 48
    place.cache.trim()
    gradients[2].close()
    place.cache.trim()
    assert place.cached_bytes() == 0


def test_a_shortage_is_mended_by_what_is_kept(fake) -> None:
    place = Device(fake(memory_bytes=4 * SLOT + 1000))
    place.device.on_shortage(place.cache.trim)
    first = place.gradient(200)
    place.put(first, 1.0, 200)
    first.close()
    assert place.cached_bytes() == 800
    second = place.gradient(250)
    place.put(second, 1.0, 250)
    assert place.cached_bytes() == 1000
    second.close()


@every_order
def test_threads_share_what_is_kept(fake, read, together, order) -> None:
    place = Device(fake(order), cache_bytes=400)

    def work(seed: int) -> None:
        for turn in range(8):
            gradient = place.gradient(50 + 10 * (turn % 2))
            chunk = place.put(gradient, seed + turn, gradient._size)
            assert (read(place.device, place.values(chunk)) == seed + turn).all()
            gradient.close()

    together(lambda: work(0), lambda: work(100), lambda: work(200))
    assert place.cached_bytes() <= 400
    place.cache.trim()
    assert place.cached_bytes() == 0


# --- what each wait is for ----------------------------------------------------------------------------------------

WAITS = {
    ("acquire", "wait_event"): "an upload overtakes the kernels that read the gradient before",
    ("release", "record"): "the same, as nobody knows when they are done",
    ("put", "wait_event"): "a kernel reads a chunk that is not there yet",
    ("put", "record"): "the same, as nobody knows when it is",
}


def forget(cupy: Any, function: str, method: str) -> None:
    """Leave a call of `gradient.py` out. The classes are those of one stand-in, so nothing else notices."""
    owner = cupy.cuda.Stream if method == "wait_event" else cupy.cuda.Event
    whole = getattr(owner, method)

    def mutated(self: Any, *arguments: Any) -> None:
        code = sys._getframe(1).f_code
        if code.co_name != function or not code.co_filename.endswith("cuda/gradient.py"):
            whole(self, *arguments)

    setattr(owner, method, mutated)


def steps_read(place: Device, read: Any, size: int = 100) -> list[set[float]]:
    """Read the gradient of each of some steps on the stream of kernels, as late as may be."""
    kept = [place.device.allocate(4 * size) for _ in range(4)]
    for value, target in enumerate(kept):
        gradient = place.gradient(size)
        for low in (0, size // 2):
            chunk = place.put(gradient, value, size // 2, low)
            place.keep(chunk, target[4 * low : 4 * low + 2 * size])
        gradient.close()
    return [set(read(place.device, target).view(np.float32).tolist()) for target in kept]


@every_order
def test_a_gradient_is_not_overwritten_before_it_is_read(fake, read, order) -> None:
    place = Device(fake(order))
    assert steps_read(place, read) == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert place.cached_bytes() == 400, "all steps had the same memory"


@pytest.mark.parametrize(("function", "method"), WAITS)
def test_without_one_wait_a_wrong_gradient_is_read_in_some_order(fake, read, settle, function, method) -> None:
    wrong = []
    for order in ORDERS:
        place = Device(fake(order))
        forget(place.cupy, function, method)
        wrong += [order] if str(steps_read(place, read)) != "[{0.0}, {1.0}, {2.0}, {3.0}]" else []
        settle(place.device)
    assert wrong, WAITS[function, method]
    assert "eager" not in wrong, "a device that is infinitely fast hides it"


@pytest.mark.parametrize("order", ["lazy", "greedy"])
@pytest.mark.parametrize("waits", [True, False], ids=["waited for", "not waited for"])
def test_dropped_memory_is_zero_whatever_was_on_its_way(fake, settle, order, waits) -> None:
    """An upload that failed half way goes on, even if the close could not wait for it, but not behind the zeros."""
    cupy = fake(order)
    place, broken = Device(cupy, cache_bytes=0), cupy.cuda.runtime.CUDARuntimeError(98)
    gradient = place.gradient(300)
    cupy.fail_next("copy", broken, after=2)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device function"):
        place.put(gradient, 1.0, 300)
    memory = gradient._block.memory
    if waits:
        gradient.close()
    else:
        cupy.fail_next("synchronize", broken)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device function"):
            gradient.close()
    settle(place.device)
    back = place.device.pinned(1200)
    with place.device.current():
        memory.data.copy_to_host_async(back.ctypes.data, 1200, place.device.down)
        place.device.down.synchronize()
    assert not back.any()


# --- gradients that nobody closes ---------------------------------------------------------------------------------


def test_a_gradient_collected_while_the_cache_is_locked_is_closed_later(fake) -> None:
    """The collector may run in the middle of any method of the cache, in the thread that holds its lock."""
    place = Device(fake())
    gradient = place.gradient(100)
    place.put(gradient, 1.0, 100)
    gradient.myself = gradient  # type: ignore[attr-defined]  # the cyclic collector alone frees it
    del gradient
    with place.cache._lock:
        gc.collect()
    assert place.cache.kept_bytes == 0
    again = place.gradient(100)
    place.put(again, 2.0, 100)
    assert place.cached_bytes() == 400, "the memory of the first is used again"
    again.close()
    place.cache.trim()
    assert place.cached_bytes() == 0


def test_a_gradient_larger_than_the_cache_is_kept_where_no_bound_was_asked_for(fake) -> None:
    cupy = fake()
    place = Device(cupy)
    place.cache = GradientCache(place.device, 100, keeps_newest=True)
    for _ in range(3):
        gradient = place.gradient(1000)
        place.put(gradient, 1.0, 1000)
        gradient.close()
        assert place.cache.kept_bytes == 4000
    small = place.gradient(10)
    place.put(small, 1.0, 10)
    small.close()
    assert place.cache.kept_bytes == 40, "the newest alone"
