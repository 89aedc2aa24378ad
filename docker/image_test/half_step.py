"""A step that is under way for as long as the test wants: half of its gradient has been sent."""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final

import numpy as np

from report import require

# The raw client belongs to the tests of the repository, which are no package that is installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))
from tests.support.raw import RawClient, Vector, step_message

__all__ = ["HalfStep"]

_SIZE: Final = 1 << 20
_LR: Final = 1e-2
_LOOKS: Final = 100_000


class HalfStep:
    """A context manager; the server is in the midst of the step when it is made."""

    def __init__(self, target: str) -> None:
        """Create a session, attach, and send the first half."""
        self._client = RawClient(target)
        created = self._client.create(_SIZE, lr=_LR)
        self._stream = self._client.attach(created.session.session_id, created.attach_token)
        self._stream.receive()
        signs = np.sign(np.random.default_rng(1).standard_normal(_SIZE, np.float32))
        self._gradient: Vector = signs * np.linspace(0.1, 1, _SIZE, dtype=np.float32)
        held = self._held()
        self._stream.send(step_message(1, self._gradient, slice(0, _SIZE // 2), commit=False))
        self._look(lambda: self._held() > held, "the server did not begin the step")

    def await_drain(self) -> None:
        """Return when the server refuses new steps."""
        self._look(lambda: self._client.info().draining, "the server does not drain")

    def finish(self) -> float:
        """Send the rest and read the answer; returns the largest error of Adam's first step, which is lr·sign(g)."""
        self._stream.send(step_message(1, self._gradient, slice(_SIZE // 2, _SIZE), begin=False))
        parameters = np.full(_SIZE, np.nan, np.float32)
        while (answer := self._stream.receive()) is not None:
            if answer.payload:
                start = answer.chunk.offset
                parameters[start : start + answer.chunk.count] = np.frombuffer(answer.payload, np.float32)
            if answer.HasField("result"):
                require(answer.result.step == 1, answer.result)
                return float(np.abs(parameters + _LR * np.sign(self._gradient)).max())
        raise AssertionError("the stream ended without a result")

    def _held(self) -> int:
        return int(self._client.info().devices[0].reserved_bytes)

    def _look(self, done: Callable[[], bool], problem: str) -> None:
        looks = itertools.count()
        while not done():
            require(next(looks) < _LOOKS, problem)

    def __enter__(self) -> HalfStep:
        """Use it for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Break what is left of it."""
        self._client.close()
