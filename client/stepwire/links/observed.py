"""The steps of a session as they are made through its link: remembered, traced, and told to the user's logger."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Final, TypeAlias

from stepwire.connection.retry import Deadline
from stepwire.links.link import SessionLink
from stepwire.loggers import Logger, checked_logger, scalars_of
from stepwire.step_result import PastStep, StepResult
from stepwire.steps.call import StepCall
from stepwire.steps.notices import Notices
from stepwire.steps.trace import StepTraces
from stepwire.v1 import step_pb2

__all__ = ["MOST_PAST_STEPS", "ObservedSteps"]

_log = logging.getLogger("stepwire")

MOST_PAST_STEPS: Final = 1024
"""The most steps that a session remembers: a little over a kilobyte each, and more with several groups."""

_Past: TypeAlias = tuple[float, float, step_pb2.StepResult]


class ObservedSteps:
    """Makes the steps of one session, and shows them to its observers. The session serialises the steps.

    Attributes:
        has_observers: a step is told to somebody, or traced: neither is done in the middle of the caller's own code.
    """

    def __init__(self, link: SessionLink, logger: Logger | None = None, traces: StepTraces | None = None) -> None:
        """Make steps through a link.

        Args:
            link: the link.
            logger: the user's function; see `log_to`.
            traces: the traces of the steps; None for none, which costs a step nothing.
        """
        self._link = link
        self._traces = traces
        self._past: deque[_Past] = deque(maxlen=MOST_PAST_STEPS)
        self._telling = threading.RLock()
        self.log_to(logger)

    def log_to(self, logger: Logger | None) -> None:
        """Tell the user's function of each step from now on; None for nobody.

        Raises:
            InvalidRequestError: it is no function.
        """
        self._logger = checked_logger(logger)
        self.has_observers = self._logger is not None or self._traces is not None

    def step(self, call: StepCall, deadline: Deadline) -> _Past:
        """Apply one step, and remember it; see `SessionLink.step`."""
        began = time.perf_counter()
        if self._traces is None:
            result = self._link.step(call, deadline)
        else:
            result = self._traced(self._traces, call, deadline)
        return self.remember(began, result)

    def remember(self, began: float, result: step_pb2.StepResult) -> _Past:
        """Remember a step, whose begin is a time of `time.perf_counter`."""
        past = time.time(), time.perf_counter() - began, result
        self._past.append(past)
        return past

    def tell(self, past: _Past, notices: Notices) -> None:
        """Tell the logger of a step that was made.

        The step is applied, and its parameters are there: whatever the logger raises must not keep them from the
        caller, who would send the gradient once more. So it becomes a line of `logging`.
        """
        if (logger := self._logger) is None:
            return
        step = past[2].step
        try:
            with self._telling:
                notices.give("logger", logger, step, scalars_of(_decoded(past)))
        except BaseException:
            _log.exception("the logger failed at step %d; the step is applied, and training goes on", step)

    def history(self, n: int) -> tuple[PastStep, ...]:
        """Return the last `n` steps that are remembered, oldest first."""
        past = tuple(self._past)  # in one go, while another thread may step
        return tuple(map(_decoded, past[max(len(past) - n, 0) :]))

    def _traced(self, traces: StepTraces, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        call.trace = trace = traces.begin(call.begin)
        try:
            result = self._link.step(call, deadline)
        except BaseException as error:
            traces.end(trace, call.begin.step, error)
            raise
        traces.end(trace, call.begin.step, None)
        return result


def _decoded(past: _Past) -> PastStep:
    end_time, seconds, result = past
    return PastStep(StepResult.from_wire(result), end_time, seconds)
