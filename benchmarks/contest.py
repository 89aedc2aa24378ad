"""Contests: contenders that do the same job, timed in alternating rounds of one run.

A small virtual machine wanders by half from one minute to the next, so that only what was timed side by side can be
compared: every ratio is taken round by round, and its median is quoted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "FAILED",
    "Absent",
    "Action",
    "Contender",
    "Outcome",
    "Ratios",
    "batch_of",
    "failure",
    "hold",
    "needed",
    "ratio",
    "timed",
]

Action = Callable[[], Any]
Ratios = Mapping[str, tuple[str, tuple[str, ...]]]
"""Figures, and the times they are the ratio of: one to the sum of others."""
Prepare = Callable[[contextlib.ExitStack, int], Action]
# Some contenders leave threads that wait for more work on every core for a while (OpenMP): nobody else shall pay for
# that.
_PAUSE_SECONDS = 0.02
FAILED = "failed:"
_BATCHES = ((2_000, 100), (20_000, 50), (2_000_000, 5))


class Absent(Exception):
    """A contender cannot take part here; the message says why."""


class Contender(NamedTuple):
    """Who takes part.

    Attributes:
        name: what figures are called by.
        prepare: `(stack, size) → action`: makes ready a job of `size` parameters and hands to the stack what must be
            closed at the end.
    """

    name: str
    prepare: Prepare


class Outcome(NamedTuple):
    """What a contest found.

    Attributes:
        size: parameters of the job.
        times: seconds of the job by contender, a round each; those of a round belong together.
        left_out: why a contender has none: what is not there, or `failure` of what went wrong.
    """

    size: int
    times: dict[str, list[float]]
    left_out: dict[str, str]

    def figures(self) -> dict[str, Any]:
        """Return the median of each contender in milliseconds, and who was left out."""
        medians = {f"{name} ms": statistics.median(values) * 1e3 for name, values in self.times.items()}
        rounds = max(map(len, self.times.values()), default=0)
        return {"parameters": self.size, "rounds": rounds, **medians} | {
            f"{name} left out": reason for name, reason in self.left_out.items()
        }

    def ratios(self, wanted: Ratios) -> dict[str, float]:
        """Return the median ratios of contenders to sums of others, where all of them took part."""
        return {
            figure: ratio(self.times, one, *others)
            for figure, (one, others) in wanted.items()
            if {one, *others} <= self.times.keys()
        }


def ratio(times: dict[str, list[float]], one: str, *others: str) -> float:
    """Return the median over rounds of one contender's time to the sum of others'."""
    sums = map(sum, zip(*(times[other] for other in others), strict=True))
    return statistics.median(value / total for value, total in zip(times[one], sums, strict=True))


def batch_of(size: int) -> int:
    """Return how often a job of so many parameters is done in one round: often where it is short."""
    return next((batch for largest, batch in _BATCHES if size <= largest), 1)


def hold(contenders: Sequence[Contender], size: int, *, rounds: int, batch: int = 1) -> Outcome:
    """Time every contender in every round; a round's time is the median of its batch."""
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        ready: dict[str, Action] = {}
        for contender in contenders:
            with _excused(contender.name, left_out):
                ready[contender.name] = _warmed(contender.prepare(stack, size))
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name in [name for name in ready if name not in left_out]:
                with _excused(name, left_out):
                    times[name].append(_round(ready[name], batch))
        ready.clear()
    gc.collect()
    kept = {name: values for name, values in times.items() if name not in left_out}
    return Outcome(size, kept, left_out)


def failure(problem: Exception) -> str:
    """Return what stands in the place of a figure that something went wrong with; see `report.failures`."""
    return f"{FAILED} {type(problem).__name__}: {str(problem).partition(chr(10))[0]:.200}"


def timed(action: Action) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def needed(module: str) -> Any:
    """Import what only some machines have.

    Raises:
        Absent: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Absent(f"{module} cannot be imported here: {problem}") from None


def _round(action: Action, batch: int) -> float:
    time.sleep(_PAUSE_SECONDS)
    if batch > 1:  # what a short job finds in the caches is its own; a long one finds nothing anyway
        action()
    return statistics.median(timed(action) for _ in range(batch))


def _warmed(action: Action) -> Action:
    for _ in range(2):
        action()
    return action


@contextlib.contextmanager
def _excused(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Leave a contender out where it cannot take part, and aloud where it fails."""
    try:
        yield
    except Absent as reason:
        left_out[name] = str(reason)
    except Exception as problem:
        left_out[name] = failure(problem)
        print(f"{name} failed:", file=sys.stderr)
        traceback.print_exc()
