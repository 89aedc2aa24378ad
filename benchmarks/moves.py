"""The pause of a training whose session moves to other servers: its slowest step, beside a copy of the state.

A thread steps again and again while the session moves from two servers to two others, and back. The whole state goes
once through the process that moves it, so the floor is that state, read from a session and loaded into it.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import stepwire
from stepwire_server.processes.spawn import server_process
from timing import times_of

__all__ = ["Scale", "moves"]

Figures = dict[str, Any]

_SERVERS = 4


class Scale(NamedTuple):
    """The parameters of the whole model, and the moves."""

    parameters: int = 16_000_000
    moves: int = 6

    @classmethod
    def quick(cls) -> Scale:
        """Return a short form, for checking the benchmark."""
        return cls(50_000, 2)


class Training:
    """Steps in a thread, until the end of a block.

    Attributes:
        spans: the begin and the end of each step.
    """

    def __init__(self, session: Any, gradient: dict[str, Any]) -> None:
        """Step a session by one gradient."""
        self.spans: list[tuple[float, float]] = []
        self._session, self._gradient = session, gradient
        self._over = threading.Event()
        self._stepped = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._train)

    def __enter__(self) -> Training:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and raise what a step has raised."""
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def further(self, steps: int) -> None:
        """Wait for so many more steps, or for the end of the training."""
        with self._stepped:
            until = len(self.spans) + steps
            self._stepped.wait_for(lambda: len(self.spans) >= until or self._failure is not None)

    def slowest_within(self, begin: float, end: float) -> float:
        """Return the seconds of the slowest step that was under way between two moments."""
        return max(after - before for before, after in self.spans if after > begin and before < end)

    def _train(self) -> None:
        out = {name: np.empty_like(array) for name, array in self._gradient.items()}
        try:
            while not self._over.is_set():
                begin = time.perf_counter()
                self._session.step(self._gradient, out=out)
                with self._stepped:
                    self.spans.append((begin, time.perf_counter()))
                    self._stepped.notify_all()
        except BaseException as failure:
            with self._stepped:
                self._failure = failure
                self._stepped.notify_all()


def moves(scale: Scale) -> Figures:
    """Measure ordinary steps, the slowest step of each move, and a copy of the state."""
    gradient = {"w": np.full(scale.parameters, 0.01, np.float32)}
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(server_process("--device", "cpu")).target for _ in range(_SERVERS)]
        client = stack.enter_context(stepwire.connect(targets[:2], transport="tcp"))
        session = client.create_session(gradient)
        copied = times_of(lambda: session.load_state(session.state()), 3)
        pauses, ordinary = list[float](), list[float]()
        with Training(session, gradient) as training:
            training.further(3)
            for _, onto in zip(range(scale.moves), itertools.cycle((targets[2:], targets[:2])), strict=False):
                ordinary += [end - begin for begin, end in training.spans[-3:]]
                begin = time.perf_counter()
                stepwire.move_session(session.own_id, targets, onto)
                end = time.perf_counter()
                training.further(4)  # the first of them may have begun before
                pauses.append(training.slowest_within(begin, end))
        session.close()
    step, pause, copy = (statistics.median(times) for times in (ordinary, pauses, copied))
    return {
        "parameters": scale.parameters,
        "moves": scale.moves,
        "ordinary step ms": step * 1e3,
        "slowest step of a move ms": pause * 1e3,
        "copy of the state ms": copy * 1e3,
        "slowest step of a move to a copy and a step": pause / (copy + step),
    }
