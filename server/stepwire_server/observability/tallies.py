"""Tallies of steps and calls, in plain lists of the thread that counts: no lock, and no library, in a step.

Each thread has a tally of its own, so each list has one writer. A stream is served by one thread at a time, so the
tally of a thread is that of its streams. Whoever reads adds the tallies up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import numpy as np

from stepwire_server.observability.histograms import Histogram
from stepwire_server.records.committed import Committed
from stepwire_server.records.replied import Replied
from stepwire_server.records.step_result import StepResult

__all__ = ["STAGES", "Tallies", "Tally"]

_Key = TypeVar("_Key")

STAGES: Final = ("receive", "queue", "reduce", "apply", "sync", "send")
"""The stages of a step, in their order."""


class Tally:
    """The counts of one thread, or the sum of several.

    Attributes:
        steps: the steps by transport and outcome.
        step_seconds: the times of steps that were replied to, by transport.
        stages: the times of each stage, as `STAGES` orders them.
        moved: the bytes by direction, transport and encoding.
        round_waits: the waits of contributions for the end of their round.
        started: the calls that have begun, by kind, service and method.
        handled: the calls that have ended, by kind, service, method and status.
        handling: the times of calls, by kind, service and method.
        refusals: the errors that clients were told, by reason.
    """

    __slots__ = (
        "handled",
        "handling",
        "moved",
        "refusals",
        "round_waits",
        "stages",
        "started",
        "step_seconds",
        "steps",
    )

    def __init__(self) -> None:
        """Start with nothing."""
        self.steps: dict[tuple[str, str], int] = {}
        self.step_seconds: dict[str, Histogram] = {}
        self.stages = tuple(Histogram() for _ in STAGES)
        self.moved: dict[tuple[str, str, np.dtype[Any]], int] = {}
        self.round_waits = Histogram()
        self.started: dict[tuple[str, str, str], int] = {}
        self.handled: dict[tuple[str, str, str, str], int] = {}
        self.handling: dict[tuple[str, str, str], Histogram] = {}
        self.refusals: dict[str, int] = {}

    @classmethod
    def sum_of(cls, tallies: Sequence[Tally]) -> Tally:
        """Return the sum of tallies, in which their threads may go on counting."""
        result = cls()
        result.steps = _sum(tally.steps for tally in tallies)
        result.moved = _sum(tally.moved for tally in tallies)
        result.started = _sum(tally.started for tally in tallies)
        result.handled = _sum(tally.handled for tally in tallies)
        result.refusals = _sum(tally.refusals for tally in tallies)
        result.step_seconds = _together(tally.step_seconds for tally in tallies)
        result.handling = _together(tally.handling for tally in tallies)
        stages = zip(*(tally.stages for tally in tallies), strict=True)
        result.stages = tuple(map(Histogram.sum_of, stages))
        result.round_waits = Histogram.sum_of(tally.round_waits for tally in tallies)
        return result


class Tallies:
    """The tallies of all threads. Thread-safe."""

    def __init__(self) -> None:
        """Start without threads."""
        self._own = threading.local()
        self._lock = threading.Lock()
        self._threads: list[tuple[threading.Thread, Tally]] = []
        self._ended = Tally()

    @property
    def own(self) -> Tally:
        """The tally of the present thread."""
        try:
            tally: Tally = self._own.tally
        except AttributeError:
            tally = self._own.tally = Tally()
            with self._lock:
                self._threads.append((threading.current_thread(), tally))
        return tally

    def total(self) -> Tally:
        """Return the sum of all tallies; those of threads that have ended are kept as one."""
        with self._lock:
            alive = set(threading.enumerate())
            ended = [tally for thread, tally in self._threads if thread not in alive]
            self._threads = [each for each in self._threads if each[0] in alive]
            self._ended = Tally.sum_of([self._ended, *ended])
            return Tally.sum_of([self._ended, *(tally for _, tally in self._threads)])

    def committed(self, committed: Committed) -> None:
        """Count a committed step; a `CommitSink`."""
        tally, times = self.own, committed.result.times
        _count(tally.steps, (committed.transport, _effect(committed.result)))
        receive, queue, reduce, apply, _, _ = tally.stages
        receive.observe(times.receive)
        queue.observe(times.queue)
        apply.observe(times.apply)
        if times.reduce:
            reduce.observe(times.reduce)

    def replied(self, replied: Replied) -> None:
        """Count a reply: bytes and times that no commit knows, and replies without a commit."""
        tally, result, transport = self.own, replied.result, replied.transport
        if result.replayed:
            _count(tally.steps, (transport, "replayed"))
        if result.round is not None:
            if result.round.dropped:
                _count(tally.steps, (transport, "dropped"))
            tally.round_waits.observe(result.round.waiting_seconds)
        _count(tally.moved, ("received", transport, replied.gradient_dtype), replied.received_bytes)
        _count(tally.moved, ("sent", transport, replied.reply_dtype), replied.sent_bytes)
        *_, sync, send = tally.stages
        if replied.sync_seconds:
            sync.observe(replied.sync_seconds)
        send.observe(replied.send_seconds)
        _observe(tally.step_seconds, transport, replied.seconds)

    def call_started(self, method: tuple[str, str, str]) -> None:
        """Count a call that has begun, of a kind, service and method."""
        _count(self.own.started, method)

    def call_handled(self, method: tuple[str, str, str], code: str, seconds: float) -> None:
        """Count a call that has ended with a status."""
        tally = self.own
        _count(tally.handled, (*method, code))
        _observe(tally.handling, method, seconds)

    def refused(self, reason: str) -> None:
        """Count an error that a client was told."""
        _count(self.own.refusals, reason)


def _effect(result: StepResult) -> str:
    if result.skipped:
        return "skipped"
    return "accumulated" if result.accumulated else "applied"


def _count(counts: dict[Any, int], key: Any, number: int = 1) -> None:
    counts[key] = counts.get(key, 0) + number


def _observe(histograms: dict[Any, Histogram], key: Any, seconds: float) -> None:
    histogram = histograms.get(key)
    if histogram is None:
        histogram = histograms[key] = Histogram()
    histogram.observe(seconds)


def _sum(parts: Iterable[dict[_Key, int]]) -> dict[_Key, int]:
    result: dict[_Key, int] = {}
    for part in parts:
        for key, number in part.copy().items():  # copied in one go: its thread may add a key
            result[key] = result.get(key, 0) + number
    return result


def _together(parts: Iterable[dict[_Key, Histogram]]) -> dict[_Key, Histogram]:
    found: dict[_Key, list[Histogram]] = {}
    for part in parts:
        for key, histogram in part.copy().items():
            found.setdefault(key, []).append(histogram)
    return {key: Histogram.sum_of(histograms) for key, histograms in found.items()}
