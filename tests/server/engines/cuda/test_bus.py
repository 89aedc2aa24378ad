"""Bytes cross the bus unchanged, whatever the device takes its time for, and buffers come back whatever goes wrong."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from stepwire_server.engines.cuda import bus as bus_module
from stepwire_server.engines.cuda.bus import Bus, Crossings, _PinnedRanges
from stepwire_server.engines.cuda.device import CudaDevice

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]
BUFFER = 1 << 8

every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


def make(cupy: Any, buffers: int = 2) -> tuple[CudaDevice, Bus]:
    device = CudaDevice(cupy, 0)
    return device, Bus(device, buffers, BUFFER)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([count, seed]).integers(0, 256, count, np.uint8)


def to(device: CudaDevice, target: Any, size: int = BUFFER) -> Callable[[int], None]:
    """Use bytes: copy them to device memory."""
    return lambda place: device.copy_across(target.data.ptr, place, size)


def of(device: CudaDevice, source: Any, size: int = BUFFER) -> Callable[[int], None]:
    """Make bytes: copy them from device memory."""
    return lambda place: device.copy_across(place, source.data.ptr, size)


def after_uploads(device: CudaDevice) -> None:
    """Let kernels wait for what was sent, as gradients do."""
    with device.current():
        device.compute.wait_event(device.up.record())


# --- up -----------------------------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("size", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 5 * BUFFER + 3])
def test_what_is_sent_may_change_as_soon_as_it_is_sent(fake, read, order, size) -> None:
    device, bus = make(fake(order))
    target = device.allocate(size)
    owned = np.empty(size + 1, np.uint8)
    source = owned[1:]
    source[:] = drawn(size)
    source.flags.writeable = False
    bus.send(source, target.data.ptr)
    owned[:] = 0xEE
    after_uploads(device)
    assert (read(device, target) == drawn(size)).all()


@every_order
def test_sends_arrive_where_they_belong(fake, read, order) -> None:
    device, bus = make(fake(order), buffers=3)
    target, source = device.allocate(4000), drawn(4000)
    device.zero(target)
    with device.current():
        device.up.wait_event(device.compute.record())
    for low, high in [(3000, 4000), (0, 1), (1, 999), (1000, 3000)]:
        bus.send(source[low:high], target.data.ptr + low)
    after_uploads(device)
    source[999] = 0
    assert (read(device, target) == source).all()


@every_order
@pytest.mark.parametrize("size", [0, 1, BUFFER])
def test_what_is_handed_over_is_used_in_the_order_of_the_kernels(fake, read, order, size) -> None:
    device, bus = make(fake(order))
    target = device.allocate(BUFFER)
    device.zero(target)
    for turn in range(5):
        source = drawn(size, turn)
        bus.hand(source, to(device, target, size))
        source[:] = 0xEE
        assert bus.hand(source[:0], lambda place: None) is None
    expected = np.concatenate((drawn(size, 4), np.zeros(BUFFER - size, np.uint8)))
    assert (read(device, target) == expected).all()


# --- down ---------------------------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("shift", [0, 3, 13])
@pytest.mark.parametrize("size", [0, 1, BUFFER - 13])
def test_what_is_brought_is_there_after_the_wait(fake, settle, order, size, shift) -> None:
    device, bus = make(fake(order))
    crossings, source = Crossings(bus), device.allocate(BUFFER)
    bus.send(drawn(BUFFER), source.data.ptr)
    after_uploads(device)
    places: list[int] = []
    for turn in range(3):
        part = source[turn : turn + size]

        def copy(place: int, part: Any = part) -> None:
            places.append(place % BUFFER)
            of(device, part, size)(place)

        owned = np.full(size + 3, 0xEE, np.uint8)
        crossing = crossings.bring(shift, copy, owned[1 : size + 1])
        assert not crossing.ended
        crossing.wait()
        assert crossing.ended
        assert owned.tolist() == [0xEE, *drawn(BUFFER)[turn : turn + size], 0xEE, 0xEE]
        owned[:] = 0
        crossing.wait()
        assert not owned.any(), "asked again, it brings nothing anew"
    assert places == [shift] * 3
    settle(device)


@every_order
def test_a_session_with_more_on_its_way_than_there_are_buffers_waits_for_its_oldest(fake, together, order) -> None:
    device, bus = make(fake(order), buffers=2)
    crossings, source = Crossings(bus), device.allocate(BUFFER)
    bus.send(drawn(BUFFER), source.data.ptr)
    after_uploads(device)
    outs = np.full((5, 100), 0xEE, np.uint8)
    brought = []

    def bring_all() -> None:
        for turn in range(5):
            brought.append(crossings.bring(0, of(device, source[turn:], 100), outs[turn]))
            assert [crossing.ended for crossing in brought] == [k < turn - 1 for k in range(turn + 1)]
            for k in range(turn - 1):
                assert (outs[k] == drawn(BUFFER)[k : k + 100]).all(), "it was brought when its buffer was needed"
            assert (outs[turn] == 0xEE).all()

    together(bring_all)
    brought[3].wait()
    later = crossings.bring(0, of(device, source, 1), np.empty(1, np.uint8))
    assert not brought[4].ended, "a buffer was free"
    crossings.clear()
    assert later.ended and brought[4].ended
    assert all((out == drawn(BUFFER)[turn : turn + 100]).all() for turn, out in enumerate(outs))
    crossings.clear()


@every_order
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_two_sessions_share_the_buffers_without_waiting_for_each_other(fake, settle, together, order, buffers) -> None:
    device, bus = make(fake(order), buffers)
    sources = [device.allocate(BUFFER) for _ in range(2)]
    for seed, source in enumerate(sources):
        bus.send(drawn(BUFFER, seed), source.data.ptr)
    after_uploads(device)

    def work(seed: int) -> None:
        crossings = Crossings(bus)
        for _ in range(3):
            outs = np.full((4, 50), 0xEE, np.uint8)
            waited = [crossings.bring(turn, of(device, sources[seed][turn:], 50), out) for turn, out in enumerate(outs)]
            for turn, crossing in reversed(list(enumerate(waited))):
                crossing.wait()
                assert (outs[turn] == drawn(BUFFER, seed)[turn : turn + 50]).all()

    together(lambda: work(0), lambda: work(1))
    settle(device)


@every_order
def test_one_buffer_is_enough_for_all_directions_at_once(fake, settle, together, order) -> None:
    device, bus = make(fake(order), buffers=1)
    kept = [device.allocate(3 * BUFFER) for _ in range(2)]

    def work(seed: int) -> None:
        crossings, memory = Crossings(bus), kept[seed]
        for turn in range(4):
            bus.send(drawn(2 * BUFFER, turn), memory.data.ptr + BUFFER)
            bus.hand(drawn(BUFFER, turn), to(device, memory))
            after_uploads(device)
            outs = np.empty((3, BUFFER), np.uint8)
            for part, out in enumerate(outs):
                crossings.bring(0, of(device, memory[part * BUFFER :]), out)
            crossings.clear()
            assert (outs[0] == drawn(BUFFER, turn)).all()
            assert (outs[1:].ravel() == drawn(2 * BUFFER, turn)).all()

    together(lambda: work(0), lambda: work(1))
    settle(device)


def test_who_waits_for_a_buffer_gets_the_one_that_comes_back(fake, settle, together) -> None:
    device, bus = make(fake(), buffers=1)
    source, out = device.allocate(BUFFER), np.empty(4, np.uint8)
    bus.send(drawn(BUFFER), source.data.ptr)
    after_uploads(device)
    first, entered = Crossings(bus).bring(0, of(device, source, 1), np.empty(1, np.uint8)), threading.Event()

    def own() -> bool:
        entered.set()
        return False

    def give() -> None:
        assert entered.wait(60.0)
        first.wait()

    together(lambda: bus.bring(0, of(device, source, 4), out, own).wait(), give)
    assert (out == drawn(BUFFER)[:4]).all()
    settle(device)


# --- pinned memory ------------------------------------------------------------------------------------------------


@every_order
def test_pinned_memory_crosses_by_itself(fake, settle, read, order) -> None:
    cupy = fake(order)
    device, bus = make(cupy, buffers=1)
    source, out = drawn(5 * BUFFER), np.full(BUFFER, 0xEE, np.uint8)
    target, ended = device.allocate(5 * BUFFER - 2), bus._up.acquire()
    with bus.pin(source), bus.pin(out):
        assert cupy.registered_bytes == 6 * BUFFER
        bus.send(source[1:-1], target.data.ptr)
        after_uploads(device)
        crossing = Crossings(bus).bring(3, of(device, target, 20), out[5:25])
        settle(device)
        assert (out[5:25] == source[1:21]).all(), "it is there before the wait"
        crossing.wait()
        assert (out[5:25] == source[1:21]).all()
        assert (out[:5] == 0xEE).all() and (out[25:] == 0xEE).all()
        assert (read(device, target) == source[1:-1]).all()
    bus._up.release(ended)
    assert cupy.registered_bytes == 0


def test_pinned_memory_must_stay_as_it_is_until_it_has_crossed(fake, read) -> None:
    """Which shows that it is not copied first."""
    device, bus = make(fake("lazy"))
    source, target = drawn(BUFFER), device.allocate(BUFFER)
    with bus.pin(source):
        bus.send(source, target.data.ptr)
        source[:] = 7
        after_uploads(device)
        assert (read(device, target) == 7).all()


@pytest.mark.parametrize(("low", "high"), [(0, 64), (63, 65), (127, 129), (128, 200), (150, 250), (0, 256)])
def test_memory_that_is_not_all_pinned_goes_through_buffers(fake, read, low, high) -> None:
    """The pinned parts are [64, 128) and [200, 256)."""
    device, bus = make(fake("lazy"))
    memory, target = drawn(256), device.allocate(256)
    with bus.pin(memory[200:]), bus.pin(memory[64:128]):
        part = target[low:high]
        bus.send(memory[low:high], part.data.ptr)
        memory[:] = 7
        out = np.full(256, 0xEE, np.uint8)
        memory[:] = out
        after_uploads(device)
        crossing = Crossings(bus).bring(0, of(device, part, high - low), memory[low:high])
        with device.current():
            device.down.synchronize()
        assert (memory[low:high] == 0xEE).all()
        crossing.wait()
        assert (memory[low:high] == drawn(256)[low:high]).all()


def in_pages(count: int) -> np.ndarray:
    """Return memory that begins a page, `(count,) uint8`."""
    return np.frombuffer(mmap.mmap(-1, count), np.uint8)


def test_memory_is_pinned_slice_by_slice_so_that_others_come_in_between(fake, read, monkeypatch) -> None:
    monkeypatch.setattr(bus_module, "_SLICE_BYTES", 2 * mmap.PAGESIZE)
    cupy = fake("lazy")
    device, bus = make(cupy)
    memory, target = in_pages(5 * mmap.PAGESIZE), device.allocate(200)
    with bus.pin(memory):
        pinned = [known for known in cupy._driver.memories.ranges if known.kind == "registered memory"]
        slices = [(known.start - memory.ctypes.data, known.size) for known in pinned]
        assert slices == [(k * mmap.PAGESIZE, pages * mmap.PAGESIZE) for k, pages in ((0, 2), (2, 2), (4, 1))]
        assert bus.pinned_bytes == memory.nbytes
        for k, low in enumerate((2 * mmap.PAGESIZE, 2 * mmap.PAGESIZE - 50)):  # within a slice, and over its edge
            memory[low : low + 100] = drawn(100)
            bus.send(memory[low : low + 100], target.data.ptr + 100 * k)
            memory[low : low + 100] = 7 + k
            after_uploads(device)
            sent = read(device, target)[100 * k : 100 * k + 100]
            assert sent.tolist() == ([7] * 100 if k == 0 else drawn(100).tolist()), "by itself, and through a buffer"
    assert cupy.registered_bytes == bus.pinned_bytes == 0


def test_memory_of_which_a_slice_cannot_be_pinned_is_not_pinned_at_all(fake, monkeypatch) -> None:
    monkeypatch.setattr(bus_module, "_SLICE_BYTES", mmap.PAGESIZE)
    cupy = fake()
    _, bus = make(cupy)
    cupy.fail_next("hostRegister", cupy.cuda.runtime.CUDARuntimeError(2), after=2)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="out of memory"), bus.pin(in_pages(4 * mmap.PAGESIZE)):
        pytest.fail("the block is not entered")
    assert cupy.registered_bytes == bus.pinned_bytes == 0


def test_memory_that_begins_inside_a_page_is_pinned_at_once(fake, monkeypatch) -> None:
    """Two slices would share a page, which a driver pins once."""
    monkeypatch.setattr(bus_module, "_SLICE_BYTES", mmap.PAGESIZE)
    cupy = fake()
    _, bus = make(cupy)
    memory = in_pages(4 * mmap.PAGESIZE)[16:]
    with bus.pin(memory):
        assert [known.size for known in cupy._driver.memories.ranges if known.kind == "registered memory"] == [
            memory.nbytes
        ]


def test_memory_that_is_pinned_no_more_goes_through_buffers(fake, read) -> None:
    device, bus = make(fake("lazy"))
    source, target = drawn(BUFFER), device.allocate(BUFFER)
    with bus.pin(source):
        pass
    bus.send(source, target.data.ptr)
    source[:] = 7
    after_uploads(device)
    assert (read(device, target) == drawn(BUFFER)).all()


def test_memory_that_cannot_be_pinned_is_not(fake, read) -> None:
    cupy = fake()
    device, bus = make(cupy)
    source, target = drawn(BUFFER), device.allocate(BUFFER)
    cupy.fail_next("hostRegister", cupy.cuda.runtime.CUDARuntimeError(2))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="out of memory"), bus.pin(source):
        pytest.fail("the block is not entered")
    bus.send(source, target.data.ptr)
    after_uploads(device)
    assert (read(device, target) == drawn(BUFFER)).all()


def test_memory_is_pinned_no_more_after_an_error_in_the_block(fake) -> None:
    cupy = fake()
    _, bus = make(cupy)
    with pytest.raises(KeyError), bus.pin(drawn(BUFFER)):
        raise KeyError
    assert cupy.registered_bytes == 0


def test_what_is_pinned_may_change_while_it_is_looked_up() -> None:
    """Another thread replaces the list between two looks at it."""
    address = 1 << 20
    lists = iter([([0, address], [1, address + BUFFER]), ([], []), ([], [])])
    racing = type("Racing", (_PinnedRanges,), {"_ranges": property(lambda self: next(lists), lambda self, _: None)})()
    assert racing.hold(address, BUFFER)


# --- errors -------------------------------------------------------------------------------------------------------


def prove_usable(device: CudaDevice, bus: Bus, read: Any) -> None:
    """Use every buffer both ways; where one was lost, this would wait for ever."""
    target, crossings = device.allocate(bus.buffers * BUFFER), Crossings(bus)
    source = drawn(bus.buffers * BUFFER, 99)
    ended = [bus._up.try_acquire() for _ in range(bus.buffers)]
    assert None not in ended, "a buffer of the way up was lost"
    for buffer in ended:
        bus._up.release(buffer)
    ended = [bus._down.try_acquire() for _ in range(bus.buffers)]
    assert None not in ended, "a buffer of the way down was lost"
    for buffer in ended:
        bus._down.release(buffer)
    bus.send(source, target.data.ptr)
    after_uploads(device)
    bus.hand(source[:10], to(device, target[20:], 10))
    source[20:30] = source[:10]
    assert (read(device, target) == source).all()
    outs = np.empty((bus.buffers, BUFFER), np.uint8)
    for k, out in enumerate(outs):
        crossings.bring(0, of(device, target[k * BUFFER :]), out)
    crossings.clear()
    assert (outs.ravel() == source).all()


@every_order
@pytest.mark.parametrize(("operation", "after"), [("copy", 0), ("copy", 3), ("synchronize", 0), ("synchronize", 3)])
def test_a_send_that_fails_gives_its_buffer_back(fake, read, settle, order, operation, after) -> None:
    cupy = fake(order)
    device, bus = make(cupy)
    broken, target = cupy.cuda.runtime.CUDARuntimeError(98), device.allocate(5 * BUFFER)
    cupy.fail_next(operation, broken, after)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
        bus.send(drawn(5 * BUFFER), target.data.ptr)
    assert caught.value is broken
    prove_usable(device, bus, read)
    settle(device)


@every_order
@pytest.mark.parametrize("failing", ["copy", "synchronize", "use"])
def test_what_cannot_be_used_gives_its_buffer_back(fake, read, order, failing) -> None:
    cupy = fake(order)
    device, bus = make(cupy)
    broken = cupy.cuda.runtime.CUDARuntimeError(98)

    def use(memory: Any) -> None:
        raise broken

    if failing != "use":
        cupy.fail_next(failing, broken)
    for _ in range(bus.buffers if failing == "use" else 1):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
            bus.hand(drawn(10), use)
        assert caught.value is broken
    prove_usable(device, bus, read)


@every_order
@pytest.mark.parametrize("failing", ["copy", "make"])
def test_what_cannot_be_made_gives_its_buffer_back(fake, read, order, failing) -> None:
    cupy = fake(order)
    device, bus = make(cupy)
    broken, crossings = cupy.cuda.runtime.CUDARuntimeError(98), Crossings(bus)

    def make_nothing(memory: Any) -> None:
        if failing == "make":
            raise broken
        cupy.fail_next("copy", broken)

    for _ in range(bus.buffers):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
            crossings.bring(0, make_nothing, np.empty(10, np.uint8))
        assert caught.value is broken
    prove_usable(device, bus, read)


@every_order
def test_a_wait_that_fails_gives_its_buffer_back(fake, read, order) -> None:
    cupy = fake(order)
    device, bus = make(cupy)
    broken, source = cupy.cuda.runtime.CUDARuntimeError(98), device.allocate(BUFFER)
    crossing = Crossings(bus).bring(0, of(device, source, 10), np.empty(10, np.uint8))
    cupy.fail_next("synchronize", broken)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
        crossing.wait()
    assert caught.value is broken and crossing.ended
    prove_usable(device, bus, read)


@every_order
def test_after_an_error_a_session_holds_no_buffers(fake, read, order) -> None:
    """Nobody may ever wait for the crossings before the error, and other sessions need the buffers."""
    cupy = fake(order)
    device, bus = make(cupy, buffers=3)
    source, crossings, outs = device.allocate(BUFFER), Crossings(bus), np.empty((2, BUFFER), np.uint8)
    bus.send(drawn(BUFFER), source.data.ptr)
    after_uploads(device)
    brought = [crossings.bring(0, of(device, source), out) for out in outs]
    broken = ValueError("it cannot be made")

    def make_nothing(memory: Any) -> None:
        cupy.fail_next("synchronize", KeyError("a second error, which is not the first"))
        raise broken

    with pytest.raises(ValueError) as caught:
        crossings.bring(0, make_nothing, np.empty(1, np.uint8))
    assert caught.value is broken
    assert [crossing.ended for crossing in brought] == [True, True]
    assert (outs[1] == drawn(BUFFER)).all()
    prove_usable(device, bus, read)


def test_rings_are_counted(fake) -> None:
    cupy = fake()
    _, bus = make(cupy, buffers=3)
    assert cupy.used_bytes == bus.device_bytes == cupy.pinned_bytes == 6 * BUFFER
    assert (bus.buffers, bus.buffer_bytes) == (3, BUFFER)


# --- what each wait is for ----------------------------------------------------------------------------------------


class Mutation(NamedTuple):
    """A call of the bus that is left out.

    Attributes:
        function: that makes it.
        method: of an event, a stream or the device.
        stream: that it is given; None where it is given none, or an event.
        instead: the stream that is given in its place; None to leave the call out.
        symptom: what then happens.
    """

    function: str
    method: str
    stream: str | None
    instead: str | None
    symptom: str


MUTATIONS = [
    Mutation("_filled", "wait", None, None, "a buffer is refilled before its bytes are on the device"),
    Mutation("send", "record", "up", None, "the same, as nobody knows when they are"),
    Mutation("hand", "record", "up", None, "bytes are used before they are on the device"),
    Mutation("hand", "wait_event", None, None, "the same, as nobody waits"),
    Mutation("hand", "record", "compute", None, "a buffer is refilled before its bytes are used"),
    Mutation("hand", "record", "compute", "up", "the same, as only their copy is waited for"),
    Mutation("bring", "record", "compute", None, "bytes leave the device before they are made"),
    Mutation("bring", "wait_event", None, None, "the same, as nobody waits"),
    Mutation("bring", "record", "down", None, "bytes are taken before they are there"),
    Mutation("bring", "record", "down", "compute", "the same, as only their making is waited for"),
    Mutation("wait", "wait", None, None, "the same, as nobody waits"),
]


def mutate(device: CudaDevice, mutation: Mutation) -> None:
    """Leave a call out. The classes are those of one stand-in, so nothing else notices."""
    if mutation.method == "wait":
        wait = device.wait
        device.wait = lambda event: None if _is_called_by(mutation) else wait(event)  # type: ignore[method-assign]
        return
    owner = device.cupy.cuda.Stream if mutation.method == "wait_event" else device.cupy.cuda.Event
    whole = getattr(owner, mutation.method)
    stream = mutation.stream and getattr(device, mutation.stream)
    instead = mutation.instead and getattr(device, mutation.instead)

    def mutated(self: Any, *arguments: Any) -> None:
        if not _is_called_by(mutation) or (stream is not None and arguments != (stream,)):
            whole(self, *arguments)
        elif instead is not None:
            whole(self, instead)

    setattr(owner, mutation.method, mutated)


def _is_called_by(mutation: Mutation) -> bool:
    """Tell whether the caller of the caller is the function of a mutation."""
    function = sys._getframe(2).f_code
    return function.co_name == mutation.function and function.co_filename.endswith("cuda/bus.py")


def traffic_is_right(device: CudaDevice, bus: Bus, read: Any) -> bool:
    """Send, hand and bring by turns, and tell whether every byte came where it belongs."""
    sent, crossings = device.allocate(5 * BUFFER), Crossings(bus)
    handed = device.allocate(BUFFER)
    outs = np.full((5, BUFFER), 0xEE, np.uint8)
    for turn, out in enumerate(outs):
        bus.send(drawn(BUFFER, 10 + turn), sent.data.ptr + turn * BUFFER)
        bus.hand(drawn(BUFFER, turn), to(device, handed))
        crossings.bring(0, of(device, handed), out)
    crossings.clear()
    brought = outs.copy()  # before anything else is waited for
    after_uploads(device)
    arrived = read(device, sent).reshape(5, BUFFER)
    turns = range(5)
    return all((brought[k] == drawn(BUFFER, k)).all() and (arrived[k] == drawn(BUFFER, 10 + k)).all() for k in turns)


@every_order
def test_traffic_is_right_with_all_waits(fake, read, settle, order) -> None:
    device, bus = make(fake(order))
    assert traffic_is_right(device, bus, read)
    settle(device)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda it: f"{it.function}-{it.method}-{it.stream}-{it.instead}")
def test_traffic_without_one_wait_is_wrong_in_some_order(fake, read, settle, mutation) -> None:
    wrong = []
    for order in ORDERS:
        device, bus = make(fake(order))
        mutate(device, mutation)
        if not traffic_is_right(device, bus, read):
            wrong.append(order)
        settle(device)
    assert wrong, mutation.symptom
    assert "eager" not in wrong, "a device that is infinitely fast hides it"
