"""The steps of a session as they are made through its link, for whoever looks at them."""

from __future__ import annotations

from stepwire.connection.retry import Deadline
from stepwire.links.link import SessionLink
from stepwire.steps.call import StepCall
from stepwire.steps.trace import StepTraces

__all__ = ["ObservedSteps"]


class ObservedSteps:
    """Makes the steps of one session, and shows them to its observers. The session serialises the steps."""

    def __init__(self, link: SessionLink, traces: StepTraces | None = None) -> None:
        """Make steps through a link.

        Args:
            link: the link.
            traces: the traces of the steps; None for none, which costs a step nothing.
        """
        self._link = link
        self._traces = traces

    def step(self, call: StepCall, deadline: Deadline) -> None:
        """Apply one step; see `SessionLink.step`."""
        if self._traces is None:
            self._link.step(call, deadline)
        else:
            self._traced(self._traces, call, deadline)

    def _traced(self, traces: StepTraces, call: StepCall, deadline: Deadline) -> None:
        call.trace = trace = traces.begin(call.begin)
        try:
            self._link.step(call, deadline)
        except BaseException as error:
            traces.end(trace, call.begin.step, error)
            raise
        traces.end(trace, call.begin.step, None)
