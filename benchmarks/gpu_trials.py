"""The experiments of `gpu_experiments`: each returns its outcome by name, and leaves nothing on the device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from gpu_clock import Clock
from gpu_sections import ADAM, adam_pass, adam_slots, tiled
from stepwire.errors import StepwireError
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines import PARAM, CudaEngine
from stepwire_server.engines.cuda import bus as bus_module
from stepwire_server.engines.cuda import kernels as kernels_module
from stepwire_server.rules import Precision, Recipe

__all__ = ["Outcome", "Workbench", "environment", "grids", "pieces", "pinning", "shortage", "stalls", "sums", "waits"]

Outcome = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workbench:
    """A device, and how much the experiments ask of it.

    Attributes:
        engine: the engine of the device.
        clock: the clock on the device.
        size: the parameters of a session that fills the device.
        piece_bytes: the pieces of a gradient, by words.
        copies: the copies of `copy_bytes` that keep the way down busy.
        copy_bytes: the bytes of one.
        pinned_bytes: the memory that is pinned.
        busy_ms: the milliseconds for which a stream is kept busy.
        rounds: how often an action is timed.
    """

    engine: CudaEngine
    clock: Clock
    size: int = 100_000_000
    piece_bytes: tuple[int, ...] = (4 << 20, 16 << 20)
    copies: int = 64
    copy_bytes: int = 8 << 20
    pinned_bytes: int = 512 << 20
    busy_ms: float = 200.0
    rounds: int = 9

    @property
    def device(self) -> Any:
        """The `CudaDevice`; the engine shows it to nobody else."""
        return self.engine._resources.device

    def busy(self) -> None:
        """Keep the stream of kernels busy for about `busy_ms`, as the clock says."""
        once = self.clock.on_device(lambda: None, lead=1) + self.clock.on_device(self._overwrite, lead=1)
        for _ in range(max(1, int(self.busy_ms / 1e3 / max(once, 1e-6)))):
            self._overwrite()

    def device_ms(self, action: Callable[[], Any]) -> float:
        """Return the device's median milliseconds of an action."""
        action()
        return statistics.median(self.clock.on_device(action, lead=4) for _ in range(self.rounds)) * 1e3

    def tidy(self) -> None:
        """Wait for the device, and give back what only waits for the next step."""
        with contextlib.suppress(Exception):  # of a device that an experiment has lost
            self.clock.settle()
            self.engine.rest()
        gc.collect()

    @contextlib.contextmanager
    def session(self, recipe: Recipe, size: int) -> Iterator[tuple[Any, Any]]:
        """Lend a state and its gradient on the device, in one chunk."""
        with contextlib.closing(self.engine.allocate(adam_slots(recipe), size)) as state:
            with contextlib.closing(state.receive()) as gradient:
                yield state, gradient.put(0, tiled(size))
                state.settle()

    def _overwrite(self) -> None:
        wiped = self.clock.wiped
        with self.device.current():
            wiped.data.memset_async(0, wiped.nbytes, self.device.compute)


def environment(bench: Workbench) -> Outcome:
    """Tell what the device, its driver and this process are."""
    device, cupy = bench.device, bench.device.cupy
    statistics_now, attributes = bench.engine.statistics(), cupy.cuda.Device(device.index).attributes
    return {
        "name": device.description,
        "python": sys.version.split()[0],
        "cupy": cupy.__version__,
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "cores": len(os.sched_getaffinity(0)),
        "multiprocessors": device.multiprocessors,
        "copy_engines": attributes.get("AsyncEngineCount"),
        "cache_bytes": attributes.get("L2CacheSize"),
        "free_bytes": device.free_bytes(),
        "taken_bytes": statistics_now.taken_bytes,
        "code_bytes": statistics_now.code_bytes,
    }


def sums(bench: Workbench) -> Outcome:
    """Does a sum, which kernels write to the host, wait for large copies down? And would a small copy have waited?"""
    device, outcome = bench.device, Outcome()
    big, host = device.allocate(bench.copy_bytes), device.pinned(bench.copy_bytes)
    small = device.pinned(min(1 << 14, bench.copy_bytes))
    elements = bench.copy_bytes // 4

    def copy_down() -> None:
        event = device.event()
        with device.current():
            big.data.copy_to_host_async(small.ctypes.data, small.nbytes, device.compute)
            event.record(device.compute)
        device.wait(event)

    with bench.session(Recipe(ADAM.rule), elements) as (state, chunk):
        actions = {"sum": lambda: state.sum_of_squares(chunk, 0, elements, 1.0).wait(), "small_copy": copy_down}
        for name, action in actions.items():
            for busy, count in (("idle", 0), ("behind_copies", bench.copies)):
                action()
                bench.clock.settle()
                with device.current():
                    for _ in range(count):
                        device.copy_down(host.ctypes.data, big.data.ptr, bench.copy_bytes)
                outcome[f"{name}_{busy}_us"] = _timed(action) * 1e6
                outcome[f"{name}_{busy}_all_us"] = outcome[f"{name}_{busy}_us"] + _timed(bench.clock.settle) * 1e6
    return outcome


def pieces(bench: Workbench) -> Outcome:
    """Microseconds of Python, CuPy and driver for a piece of pinned memory: up with its sum, and down as a reply."""
    outcome = Outcome()
    for nbytes in bench.piece_bytes:
        elements = nbytes // 4
        for threads in (1, 2):
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                trips = [pool.submit(_trip, bench, elements) for _ in range(threads)]
                up, down = (max(each) for each in zip(*(trip.result() for trip in trips), strict=True))
            outcome |= {f"up_{nbytes >> 10}KiB_{threads}_us": up, f"down_{nbytes >> 10}KiB_{threads}_us": down}
    return outcome


def _trip(bench: Workbench, elements: int, count: int = 8) -> tuple[float, float]:
    """Return the least processor time of a piece up and of a piece down, of one thread."""
    size, step = elements * count, adam_pass(ADAM)
    source, target = np.ones(size, np.float32), np.ones(size, np.float32)
    up, down = [], []
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(contextlib.closing(bench.engine.allocate(adam_slots(ADAM), size)))
        for array in (source, target):
            stack.enter_context(bench.engine.bus.pin(array.view(np.uint8)))
        for _ in range(bench.rounds):
            with contextlib.closing(state.receive()) as gradient:
                begun = time.thread_time()
                chunks = [gradient.put(low, source[low : low + elements]) for low in range(0, size, elements)]
                asked = [state.sum_of_squares(chunk, 0, elements, 1.0) for chunk in chunks]
                up.append((time.thread_time() - begun) / count)
                for pending in asked:
                    pending.wait()
                begun = time.thread_time()
                for low, chunk in zip(range(0, size, elements), chunks, strict=True):
                    state.update(step, low, chunk, 0, elements, target[low : low + elements]).wait()
                down.append((time.thread_time() - begun) / count)
                state.settle()
    return min(up) * 1e6, min(down) * 1e6


def grids(bench: Workbench) -> Outcome:
    """The time of a pass by the waves of its grid: float32, with telemetry, and with moments of 8 bits."""
    outcome = Outcome()
    telemetry, eight_bits = Recipe(ADAM.rule, measures=True), Recipe(ADAM.rule, precision=Precision.INT8)
    tried = [
        ("adam", ADAM, "_WAVES", (1, 2, 4, 8, 16, 64)),
        ("telemetry", telemetry, "_MOST_MEASURING_BLOCKS", (512, 1024, 1536, 2048)),
        ("int8", eight_bits, "_WAVES_OF_EIGHT_BITS", (1, 2, 4)),
    ]
    for name, recipe, constant, values in tried:
        with bench.session(recipe, bench.size) as (state, chunk):
            action = functools.partial(state.update, adam_pass(recipe), 0, chunk, 0, bench.size, None)
            for value in values:
                with mock.patch.object(kernels_module, constant, value):
                    outcome[f"{name}_{value}_ms"] = bench.device_ms(action)
        kernel = bench.engine._resources.kernels.update(recipe, FLOAT32, None)
        outcome[f"{name}_blocks_at_a_time"] = kernel.wave
    return outcome


def stalls(bench: Workbench) -> Outcome:
    """The milliseconds that calls take while the stream of kernels is busy: those that wait for it take as long.

    Another thread, whose own stream is idle, tells the longest that it was kept from the device meanwhile.
    """
    device, outcome = bench.device, Outcome()
    compiler, kept = bench.engine._resources.kernels._compiler, list[Any]()
    source = 'extern "C" __global__ void trial_%d(float *values) { values[0] += 1.0f; }'
    compiler.load("trial", source % 1)
    calls: dict[str, Callable[[], Any]] = {
        "allocate": lambda: kept.append(device.allocate(bench.copy_bytes)),
        "free": kept.clear,
        "load_known_module": lambda: compiler.load("trial", source % 1).get_function("trial_1"),
        "compile_and_load": lambda: compiler.load("trial", source % time.time_ns()),
        "memory_information": device.free_bytes,
        "pin_new_memory": lambda: device.pinned(1 << 20),
        "export": lambda: bench.engine.export(2 << 20).close(),
    }
    for name, call in calls.items():
        bench.clock.settle()
        bench.busy()
        with _longest_wait(bench) as longest:
            outcome[f"{name}_ms"] = _timed(call) * 1e3
        outcome[f"{name}_longest_wait_of_another_ms"] = max(longest, default=0.0) * 1e3
        outcome[f"{name}_then_busy_for_ms"] = _timed(bench.clock.settle) * 1e3
    return outcome


def pinning(bench: Workbench) -> Outcome:
    """The seconds of pinning shared memory, in slices and at once, and the longest wait of another thread meanwhile."""
    outcome = Outcome()
    with mmap.mmap(-1, bench.pinned_bytes) as mapped:
        memory = np.frombuffer(mapped, np.uint8)
        memory[:: mmap.PAGESIZE] = 1
        for name, nbytes in (("in_slices", bus_module._SLICE_BYTES), ("at_once", bench.pinned_bytes)):
            with mock.patch.object(bus_module, "_SLICE_BYTES", nbytes), _longest_wait(bench) as longest:
                begun = time.perf_counter()
                try:
                    with bench.engine.bus.pin(memory):
                        outcome[f"{name}_seconds"] = time.perf_counter() - begun
                except Exception as problem:  # a limit of the container, which is an outcome
                    outcome[f"{name}_status"] = f"{type(problem).__name__}: {problem}"
            outcome[f"{name}_longest_wait_of_another_ms"] = max(longest, default=0.0) * 1e3
        del memory
    return outcome


@contextlib.contextmanager
def _longest_wait(bench: Workbench) -> Iterator[list[float]]:
    """Ask an idle stream for little things in another thread for a block, and note how long each takes."""
    waits, end, event = list[float](), threading.Event(), bench.device.event()

    def ask() -> None:
        with bench.device.current():
            event.record(bench.device.down)
        bench.device.wait(event)

    def work() -> None:
        while not end.is_set():
            waits.append(_timed(ask))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield waits
    finally:
        end.set()
        thread.join()


def waits(bench: Workbench) -> Outcome:
    """The processor's time of a wait for a busy stream, and the time to make a device current."""
    device, event = bench.device, bench.device.event()
    bench.clock.settle()
    bench.busy()
    with device.current():
        event.record(device.compute)
    begun, used = time.perf_counter(), time.thread_time()
    device.wait(event)
    outcome = {"wait_ms": (time.perf_counter() - begun) * 1e3, "processor_ms": (time.thread_time() - used) * 1e3}

    def make_current() -> None:
        with device.current():
            pass

    count = 1000
    return outcome | {"current_us": _timed(lambda: [make_current() for _ in range(count)]) / count * 1e6}


def shortage(bench: Workbench) -> Outcome:
    """The status of an allocation that is too large, and of a new kernel on a device that is full."""
    device = bench.device
    outcome: Outcome = {"too_much": _status(lambda: device.allocate(1 << 46))}
    kept = list[Any]()

    def fill(nbytes: int) -> None:
        while nbytes > 0:
            kept.append(device.allocate(nbytes))

    for nbytes in (device.free_bytes() - (8 << 20), 2 << 20, 4096):
        _status(lambda nbytes=nbytes: fill(nbytes))
    outcome |= {"allocations": len(kept), "free_bytes_when_full": device.free_bytes()}
    half = np.dtype(np.float16)
    recipe = Recipe(ADAM.rule, averages=True)
    outcome["new_kernel_when_full"] = _status(lambda: bench.engine._resources.kernels.update(recipe, half, half))
    outcome["session_when_full"] = _status(lambda: bench.engine.allocate({PARAM: Precision.FLOAT32}, 1 << 20))
    kept.clear()
    gc.collect()
    outcome["session_afterwards"] = _status(lambda: bench.engine.allocate({PARAM: Precision.FLOAT32}, 1 << 20).close())
    return outcome


def _timed(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _status(action: Callable[[], Any]) -> str:
    try:
        action()
    except StepwireError as problem:
        return f"{problem.reason.name}: {problem}"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "done"
