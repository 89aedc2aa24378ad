"""Contests: contenders that do the same job, timed in alternating rounds of one run.

The speed of a small virtual machine wanders by half from one minute to the next, so only times of one round can be
compared. Every ratio is of one round, and the median of the rounds is quoted.
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
    "PAUSE_SECONDS",
    "Absent",
    "Action",
    "Contender",
    "ContestResult",
    "Ratios",
    "batch_of",
    "failure",
    "needed",
    "ratio",
    "run_contest",
    "timed",
]

Action = Callable[[], Any]
Ratios = Mapping[str, tuple[str, tuple[str, ...]]]
"""Ratios by the name of their figure: the time of one contender, divided by the sum of others."""
Prepare = Callable[[contextlib.ExitStack, int], Action]
# Some contenders leave threads that wait for work on every core for a while (OpenMP). The pause keeps them out of the
# next time.
PAUSE_SECONDS = 0.02
FAILED = "failed:"
_BATCHES = ((2_000, 100), (20_000, 50), (2_000_000, 5))


class Absent(Exception):
    """A contender cannot run on this machine; the message has the reason."""


class Contender(NamedTuple):
    """One contender.

    Attributes:
        name: the name of its figures.
        prepare: `(stack, size) → action`: prepares a job of `size` parameters, and registers its resources at the
            stack.
    """

    name: str
    prepare: Prepare


class ContestResult(NamedTuple):
    """The result of a contest.

    Attributes:
        size: the number of parameters of the job.
        times: the seconds of the job by contender, one for each round.
        left_out: the reason why a contender has no times: a missing package, or the `failure` of an exception.
    """

    size: int
    times: dict[str, list[float]]
    left_out: dict[str, str]

    def figures(self) -> dict[str, Any]:
        """Return the median of each contender in milliseconds, and the reasons of contenders without times."""
        medians = {f"{name} ms": statistics.median(values) * 1e3 for name, values in self.times.items()}
        rounds = max(map(len, self.times.values()), default=0)
        return {"parameters": self.size, "rounds": rounds, **medians} | {
            f"{name} left out": reason for name, reason in self.left_out.items()
        }

    def ratios(self, wanted: Ratios) -> dict[str, float]:
        """Return the median ratios of contenders to sums of others, if all of them have times."""
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
    """Return the repetitions of a job of so many parameters in one round: more for a short job."""
    return next((batch for largest, batch in _BATCHES if size <= largest), 1)


def run_contest(contenders: Sequence[Contender], size: int, *, rounds: int, batch: int = 1) -> ContestResult:
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
    return ContestResult(size, kept, left_out)


def failure(problem: Exception) -> str:
    """Return the text in place of a figure that could not be measured; see `report.failures`."""
    return f"{FAILED} {type(problem).__name__}: {str(problem).partition(chr(10))[0]:.200}"


def timed(action: Action) -> float:
    """Return the seconds of an action."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def needed(module: str) -> Any:
    """Return a module that only some machines have.

    Raises:
        Absent: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Absent(f"{module} cannot be imported here: {problem}") from None


def _round(action: Action, batch: int) -> float:
    time.sleep(PAUSE_SECONDS)
    if batch > 1:  # fills the caches with a short job's own data; a long job's data do not fit
        action()
    return statistics.median(timed(action) for _ in range(batch))


def _warmed(action: Action) -> Action:
    for _ in range(2):
        action()
    return action


@contextlib.contextmanager
def _excused(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Leave a contender out if it cannot run here, and print the error if it fails."""
    try:
        yield
    except Absent as reason:
        left_out[name] = str(reason)
    except Exception as problem:
        left_out[name] = failure(problem)
        print(f"{name} failed:", file=sys.stderr)
        traceback.print_exc()
