"""The history of each session for a person who looks: some hundred points, and when a run went wrong.

A history is told of each commit under the session's lock. It keeps a bounded number of points: when they are too many,
neighbours are merged, and a point stands for twice the time.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from stepwire_server.records.committed import Committed
from stepwire_server.records.step_result import StepResult

__all__ = ["Histories", "History", "Point", "Trouble"]

MOST_POINTS: Final = 240
_MOST_TROUBLES: Final = 20
_MOST_SESSIONS: Final = 1024
_FIRST_SECONDS: Final = 1.0
_USUAL_STEPS: Final = 20
_USUAL_PART: Final = 0.05
_SPIKE: Final = 10.0
"""A gradient whose norm is so many times the usual one is a spike."""


class Trouble(NamedTuple):
    """A part of a run that went wrong.

    Attributes:
        kind: "nan" for NaN or Inf in the gradient, "spike" for a norm far beyond the usual one.
        at: the time of the first step of it, in seconds since 1970.
        first_step: its first step.
        last_step: its last step.
        steps: the steps in it that went wrong.
        groups: the groups of the first step that went wrong; empty where it is not known.
        workers: the workers of the first step that went wrong.
        norm: the norm of the first gradient.
    """

    kind: str
    at: float
    first_step: int
    last_step: int
    steps: int
    groups: tuple[int, ...]
    workers: tuple[int, ...]
    norm: float


class Point:
    """The steps of one interval of time, taken together.

    Attributes:
        at: the beginning, in seconds since 1970.
        steps: the steps.
        last_step: the last of them.
        norm: the largest norm of a gradient; NaN if one had NaN or Inf.
        ratio: the largest norm of an update by that of the parameters; NaN without a measurement.
        rates: the learning rate of each group in the last step.
        scale: the loss scale after the last step; NaN without one.
        clipped: the steps that were clipped by norm.
        bad: the steps whose gradient had NaN or Inf.
    """

    __slots__ = ("at", "bad", "clipped", "last_step", "norm", "rates", "ratio", "scale", "steps")

    def __init__(self, at: float) -> None:
        """Begin without a step."""
        self.at = at
        self.steps = self.last_step = self.clipped = self.bad = 0
        self.norm, self.ratio, self.scale = -math.inf, math.nan, math.nan
        self.rates: tuple[float, ...] = ()

    def add(self, result: StepResult) -> None:
        """Add a step."""
        self.steps += 1
        self.last_step = result.step
        self.bad += result.non_finite_count > 0
        self.norm = math.nan if self.bad else max(self.norm, result.grad_norm)
        if result.update_norm is not None and result.param_norm:
            self.ratio = _largest(self.ratio, result.update_norm / result.param_norm)
        self.rates = tuple(group.hyperparameters.lr for group in result.groups) or self.rates
        self.scale = math.nan if result.loss_scale is None else result.loss_scale
        self.clipped += result.clip_coefficient < 1.0 or any(group.clip_coefficient < 1.0 for group in result.groups)

    def merge(self, later: Point) -> None:
        """Add the steps of the point behind this one."""
        self.steps += later.steps
        self.clipped += later.clipped
        self.bad += later.bad
        self.norm = math.nan if self.bad else max(self.norm, later.norm)
        self.ratio = _largest(self.ratio, later.ratio)
        self.last_step, self.rates, self.scale = later.last_step, later.rates, later.scale


class History:
    """The history of one session. The session serialises `add`; others read copies.

    Attributes:
        points: the points, from the oldest.
        troubles: the last parts that went wrong, from the oldest.
        seconds: the time of a point.
        lateness: for each worker, its usual time behind the first of a round, in seconds.
    """

    def __init__(self) -> None:
        """Start without a step."""
        self.points: list[Point] = []
        self.troubles: deque[Trouble] = deque(maxlen=_MOST_TROUBLES)
        self.seconds = _FIRST_SECONDS
        self.lateness: dict[int, float] = {}
        self._usual: float | None = None
        self._calm = 0

    def add(self, committed: Committed, now: float) -> None:
        """Add a step that was committed at a time, in seconds since 1970."""
        result = committed.result
        if not self.points or now - self.points[-1].at >= self.seconds:
            self._begin(now)
        self.points[-1].add(result)
        waits = [(worker, part.waiting_seconds) for worker, part in committed.parts]
        longest = max((wait for _, wait in waits), default=0.0)
        for worker, wait in waits:
            late = self.lateness.get(worker, longest - wait)
            self.lateness[worker] = late + 0.2 * (longest - wait - late)
        if result.non_finite_count:
            self._trouble("nan", committed, now)
        elif not result.accumulated and result.grad_norm > 0.0:
            self._judge(committed, now)

    def _begin(self, now: float) -> None:
        if len(self.points) >= MOST_POINTS:
            for first, second in zip(self.points[::2], self.points[1::2], strict=False):
                first.merge(second)
            self.points, self.seconds = self.points[::2], 2 * self.seconds
            if now - self.points[-1].at < self.seconds:
                return
        self.points.append(Point(now))

    def _judge(self, committed: Committed, now: float) -> None:
        """Compare a norm with the usual one, the geometric mean of late."""
        norm = math.log(committed.result.grad_norm)
        if self._usual is not None and self._calm >= _USUAL_STEPS and norm > self._usual + math.log(_SPIKE):
            self._trouble("spike", committed, now)
        self._calm += 1
        self._usual = norm if self._usual is None else self._usual + _USUAL_PART * (norm - self._usual)

    def _trouble(self, kind: str, committed: Committed, now: float) -> None:
        result = committed.result
        last = self.troubles[-1] if self.troubles else None
        if last is not None and last.kind == kind and result.step - last.last_step <= 10:
            self.troubles[-1] = last._replace(last_step=result.step, steps=last.steps + 1)
            return
        groups = tuple(index for index, group in enumerate(result.groups) if not math.isfinite(group.grad_norm))
        if kind == "spike" and len(result.groups) > 1:
            norms = [group.grad_norm for group in result.groups]
            groups = (norms.index(max(norms)),)
        workers = _workers(committed, kind)
        self.troubles.append(Trouble(kind, now, result.step, result.step, 1, groups, workers, result.grad_norm))


class Histories:
    """The histories of all sessions that stepped of late. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Start without one; `clock` returns seconds since 1970."""
        self._clock = clock
        self._histories: dict[str, History] = {}
        self._lock = threading.Lock()  # of changes: sessions commit side by side

    def committed(self, committed: Committed) -> None:
        """Add a committed step; a `CommitSink`."""
        history = self._histories.get(committed.session_id)
        if history is None:
            history = History()
            with self._lock:
                if len(self._histories) >= _MOST_SESSIONS:  # the oldest goes
                    del self._histories[next(iter(self._histories))]
                self._histories[committed.session_id] = history
        history.add(committed, self._clock())

    def of(self, session_id: str) -> History | None:
        """Return the history of a session; None before its first step."""
        return self._histories.get(session_id)

    def keep(self, session_ids: set[str]) -> None:
        """Forget the histories of all other sessions: they have ended, or are on disk alone."""
        with self._lock:
            for session_id in set(self._histories) - session_ids:
                del self._histories[session_id]


def _workers(committed: Committed, kind: str) -> tuple[int, ...]:
    """Return the workers whose gradients were wrong; the one that brought it, where it was one."""
    contributors = () if committed.result.round is None else committed.result.round.contributors
    if not contributors:
        return (committed.worker,)
    if kind == "nan":
        return tuple(each.worker for each in contributors if each.non_finite_count) or (committed.worker,)
    return (max(contributors, key=lambda each: each.grad_norm).worker,)


def _largest(first: float, second: float) -> float:
    """Return the larger number; the other one where one is NaN."""
    if math.isnan(first):
        return second
    return first if math.isnan(second) else max(first, second)
