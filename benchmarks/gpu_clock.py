"""The means of the GPU benchmark: clocks, rounds, and free memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpu_torch import TorchSide
from stepwire_server.engines import CudaEngine

__all__ = ["Actions", "Clock", "Extent", "Gpu", "Skipped", "median", "ratio", "rounds"]

Actions = Mapping[str, Callable[[], Any]]
_WIPED_BYTES = 256 << 20


class Skipped(Exception):
    """Something is not measured; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        sizes: parameters of one session, ascending.
        bus_sizes: those whose round trips are measured.
        rounds: how often each action is timed.
        bus_rounds: how often each round trip is.
        pipeline_steps: what each of two sessions takes at once.
        chunk_bytes: of a gradient on its way in messages.
        pinned_chunk_bytes: of a gradient in pinned memory.
        tensors: how many small ones one session has, and of how many elements.
        guard_size: parameters that are compared with torch's.
        wiped_bytes: device memory that is overwritten before each timed action.
        seconds: no section is begun after these.
    """

    sizes: tuple[int, ...] = (1_000_000, 100_000_000, 1_000_000_000)
    bus_sizes: tuple[int, ...] = (100_000_000, 1_000_000_000)
    rounds: int = 15
    bus_rounds: int = 5
    pipeline_steps: int = 8
    chunk_bytes: int = 4 << 20
    pinned_chunk_bytes: int = 16 << 20
    tensors: tuple[int, int] = (300, 1000)
    guard_size: int = 1_000_000
    wiped_bytes: int = _WIPED_BYTES
    seconds: float = 200.0


class Clock:
    """Seconds on one device: its own, or those that pass for whoever waits for it."""

    def __init__(self, device: Any, wiped_bytes: int) -> None:
        """Take over the `CudaDevice` of an engine."""
        self._device = device
        self.wiped = device.allocate(wiped_bytes)

    def on_device(self, action: Callable[[], Any], lead: int = 16) -> float:
        """Return what passes on the stream `compute` while it does what `action` asks of it.

        The stream is busy overwriting memory first, `lead` times: so the processor has asked for everything before the
        first of it begins, and nothing that the action needs is left in the device's cache.
        """
        event, compute = self._device.cupy.cuda.Event, self._device.compute
        with self._device.current():
            begin, end = event(), event()
            for _ in range(lead):
                self.wiped.data.memset_async(0, self.wiped.nbytes, compute)
            begin.record(compute)
            action()
            end.record(compute)
            end.synchronize()
            return float(self._device.cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def by_the_wall(self, action: Callable[[], Any]) -> float:
        """Return what passes until an action is done and the device at rest."""
        self.settle()
        started = time.perf_counter()
        action()
        self.settle()
        return time.perf_counter() - started

    def settle(self) -> None:
        """Wait until nothing is under way on the device."""
        with self._device.current():
            self._device.cupy.cuda.Device(self._device.index).synchronize()


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Where and what is measured.

    Attributes:
        engine: of one GPU.
        clock: on it.
        torch: None where it is not installed.
        extent: how much.
    """

    engine: CudaEngine
    clock: Clock
    torch: TorchSide | None
    extent: Extent

    @property
    def device(self) -> Any:
        """The `CudaDevice`; the engine shows it to nobody else."""
        return self.engine._resources.device

    def require(self, what: str, *, device_bytes: float, host_bytes: float) -> None:
        """Make room, and raise `Skipped` if there is too little."""
        self.tidy()
        free = {"device": self.device.free_bytes(), "host": _free_host_bytes()}
        for place, needed in (("device", device_bytes), ("host", host_bytes)):
            if needed > free[place]:
                raise Skipped(f"{what} needs {needed:,.0f} bytes of {place} memory, {free[place]:,} are free")

    def tidy(self) -> None:
        """Give back what only waits for the next step."""
        gc.collect()
        self.clock.settle()
        self.engine.rest()
        if self.torch is not None:
            self.torch.rest()

    @contextlib.contextmanager
    def session(self, slots: Mapping[str, Any], size: int) -> Iterator[Any]:
        """Lend a state."""
        with contextlib.closing(self.engine.allocate(slots, size)) as state:
            yield state


def rounds(actions: Actions, clock: Callable[[Callable[[], Any]], float], count: int) -> dict[str, list[float]]:
    """Time actions in turn, after once each for nothing."""
    for action in actions.values():
        clock(action)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(count):
        for name, action in actions.items():
            times[name].append(clock(action))
    return times


def median(times: list[float]) -> float:
    """Return the median of some seconds."""
    return statistics.median(times)


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float | None:
    """Return the median of one's seconds by the other's, round by round; None if one was not measured."""
    if one not in times or other not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def _free_host_bytes() -> int:
    """Return what the kernel calls available, which caches count to."""
    lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024
