"""The way to the device and back: plain copies of pinned memory, and whole steps through the engine.

Up and down of one step follow each other, because norms need the whole gradient before the first parameter moves. So a
step of one session is no faster than both copies. Two sessions can overlap, one's way up with the other's way down, and
then a step is no faster than the slower copy.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpu_clock import Gpu, median, rounds
from gpu_sections import ADAM, Figures, adam_pass, adam_slots, tiled
from stepwire_server.steps.reply import ReplyPipeline

__all__ = ["bus"]

_SESSIONS = 2


def bus(gpu: Gpu, size: int) -> Figures:
    """Copies alone and at once, then steps from pageable and from pinned memory; all by the wall."""
    host_bytes = _SESSIONS * 2 * 4 * size
    gpu.require(f"round trips of {size:,}", device_bytes=_SESSIONS * 16.1 * size, host_bytes=1.1 * host_bytes)
    trips = [_Trip(gpu, size) for _ in range(_SESSIONS)]
    extent = gpu.extent
    with contextlib.ExitStack() as stack:
        for trip in trips:
            stack.enter_context(contextlib.closing(trip))
        pageable = median(rounds({"step": trips[0].step}, gpu.clock.by_the_wall, extent.bus_rounds)["step"])
        for trip in trips:
            stack.enter_context(trip.pinned())
        with _copies(gpu, trips[0]) as copies:
            times = rounds(copies | {"step": trips[0].step}, gpu.clock.by_the_wall, extent.bus_rounds)
        pipelined = _pipelined(gpu, trips)
    seconds = {name: median(values) for name, values in times.items()}
    slower, both = max(seconds["up"], seconds["down"]), seconds["up"] + seconds["down"]
    return {
        "up_bytes_per_second": 4 * size / seconds["up"],
        "down_bytes_per_second": 4 * size / seconds["down"],
        "at_once_bytes_per_second_each": 4 * size / seconds["at_once"],
        "up_ms": seconds["up"] * 1e3,
        "down_ms": seconds["down"] * 1e3,
        "at_once_ms": seconds["at_once"] * 1e3,
        "pageable_step_ms": pageable * 1e3,
        "pinned_step_ms": seconds["step"] * 1e3,
        "pinned_two_sessions_ms_a_step": pipelined * 1e3,
        "pageable_step_by_both_copies": pageable / both,
        "pinned_step_by_both_copies": seconds["step"] / both,
        "pinned_two_sessions_by_slower_copy": pipelined / slower,
        "pinned_two_sessions_by_copies_at_once": pipelined / seconds["at_once"],
    }


class _Trip:
    """A session with a gradient and a reply in host memory."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.source, self.target = tiled(size), np.zeros(size, np.float32)
        self._gpu, self._size = gpu, size
        self._elements = gpu.extent.chunk_bytes // 4
        self._state = gpu.engine.allocate(adam_slots(ADAM), size)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Register both arrays for a block."""
        with contextlib.ExitStack() as stack:
            for array in (self.source, self.target):
                stack.enter_context(self._gpu.engine.bus.pin(array.view(np.uint8)))
            self._elements = self._gpu.extent.pinned_chunk_bytes // 4
            yield

    def step(self, received: Callable[[], Any] = lambda: None) -> None:
        """Step as a gradient and a commit do; `received` is called between the ways up and down."""
        state, step, ranges = self._state, adam_pass(ADAM), range(0, self._size, self._elements)
        with contextlib.closing(state.receive()) as gradient:
            chunks, sums = [], []
            for low in ranges:
                chunks.append(gradient.put(low, self.source[low : low + self._elements]))
                sums.append(state.sum_of_squares(chunks[-1], 0, len(chunks[-1]), 1.0))
            for pending in sums:
                pending.wait()
            received()
            with ReplyPipeline(_Nowhere(), state.depth) as reply:
                for low, chunk in zip(ranges, chunks, strict=True):
                    out = self.target[low : low + len(chunk)]
                    reply.add([state.update(step, low, chunk, 0, len(chunk), out)])
            state.settle()

    def close(self) -> None:
        """Close the session."""
        self._state.close()


class _Nowhere:
    """A `ReplyWriter` whose buffers are the caller's own."""

    def buffer(self, offset: int, count: int) -> Any:
        """See `ReplyWriter`; no caller asks."""
        raise NotImplementedError

    def flush(self) -> None:
        """See `ReplyWriter`."""


@contextlib.contextmanager
def _copies(gpu: Gpu, trip: _Trip) -> Iterator[dict[str, Callable[[], Any]]]:
    """Lend the plain copies of a trip's pinned bytes, one each way."""
    nbytes, device = trip.source.nbytes, gpu.device
    above, below = device.allocate(nbytes), device.allocate(nbytes)

    def up() -> None:
        with device.current():
            above.data.copy_from_host_async(trip.source.ctypes.data, nbytes, device.up)

    def down() -> None:
        with device.current():
            below.data.copy_to_host_async(trip.target.ctypes.data, nbytes, device.down)

    yield {"up": up, "down": down, "at_once": lambda: (up(), down())}
    gpu.clock.settle()


def _pipelined(gpu: Gpu, trips: list[_Trip]) -> float:
    """Return seconds a step of two sessions at once, the second half a step behind the first.

    Their steps end in turn; of these times the first and the last are left out, where one of them was alone.
    """
    half_done = threading.Event()

    def follow(trip: _Trip, ready: Callable[[], Any], received: Callable[[], Any]) -> list[float]:
        ready()
        ended = []
        for _ in range(gpu.extent.pipeline_steps):
            trip.step(received)
            ended.append(time.perf_counter())
        return ended

    gpu.clock.settle()
    with concurrent.futures.ThreadPoolExecutor(_SESSIONS) as pool:
        first = pool.submit(follow, trips[0], lambda: None, half_done.set)
        second = pool.submit(follow, trips[1], lambda: half_done.wait(60), lambda: None)
        inner = sorted(first.result() + second.result())[1:-1]
    gpu.clock.settle()
    return (inner[-1] - inner[0]) / (len(inner) - 1)
