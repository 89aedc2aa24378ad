"""The link to a session on one server: steps by number, pulls, loads, and all of them again after a break."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import PulledRows
from stepwire.connection.channel import Calls
from stepwire.connection.errands import undelivered
from stepwire.connection.retry import Deadline, Retry
from stepwire.errors import StateLossError, UnsupportedFeatureError
from stepwire.links.deletion import delete, delete_held
from stepwire.links.direct import DirectStep, DirectSteps
from stepwire.links.doubts import Doubts
from stepwire.links.hold import Hold
from stepwire.links.link import Load, SessionLink
from stepwire.links.losses import Losses
from stepwire.links.open_round import await_open_round
from stepwire.links.past import LinkPast
from stepwire.links.pull_and_load import load_by_number, receive_pull
from stepwire.links.repetition import repeated
from stepwire.links.window import ReplayWindow
from stepwire.results import SessionInfo, SessionStatistics, TransportChoice
from stepwire.steps.call import Decide, StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.steps.doubt import Doubt, unfinished
from stepwire.transports.route import Route
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2, state_pb2, step_pb2

__all__ = ["RemoteLink"]

_T = TypeVar("_T")
_LEAST_SECONDS = 1e-3


class RemoteLink(SessionLink):
    """The link to a session on one server.

    Attributes:
        hold: the hold of the session's worker, for a link that steps several sessions as one.
        target: the target that the client connected to.
    """

    def __init__(
        self,
        route: Route,
        description: SessionDescription,
        token: int,
        *,
        error_feedback: bool = False,
        window_bytes: int = 0,
        worker: int | None = 0,
    ) -> None:
        """Link to a session as its server described it.

        Args:
            route: the way to the server.
            description: the session.
            token: the proof of the hold of its worker; 0 acquires the worker when a step or a load needs it.
            error_feedback: keep the encoding error of each gradient for the next one.
            window_bytes: the most bytes of steps kept to be sent again to a server that has lost them.
            worker: the index of the worker; None for whichever is vacant.

        Raises:
            InvalidRequestError: error feedback of an encoding that has none.
        """
        self._route = route
        self.target = route.calls.target
        self._description = description
        self._carry = Carry(description.message, description.packer.layout.size, error_feedback=error_feedback)
        self.hold = Hold(route, description, token, worker)
        self._window = ReplayWindow(description, self.hold, window_bytes)
        self._last_result: step_pb2.StepResult | None = None
        self._use(threading.RLock())

    def _use(self, lock: threading.RLock) -> None:
        """Make the parts that share a lock, and the arrays that outlive a step."""
        self._lock = lock
        self._doubts = Doubts(self.hold, self._carry, self._window)
        self._losses = Losses(self._route, self.hold, self._window, lock, self._doubts.forget)
        seconds = self._route.calls.seconds
        self._direct = None if self._window.keeps else DirectSteps(self, self.hold, self._doubts, seconds)

    @property
    def past(self) -> LinkPast:
        """The past of this link, which its successor goes on from."""
        doubts = self._doubts
        return LinkPast(self._lock, self._carry, self._last_result, doubts.present, doubts.untold, doubts.load)

    def succeed(self, former: RemoteLink) -> None:
        """Go on where the link to the former place of this session stopped: with its lock, its arrays, its doubt.

        A doubt stays one where the hold has come along: nobody else has held the worker since.
        """
        past = former.past
        self._carry, self._last_result = past.carry, past.last_result
        self._use(past.lock)
        self._doubts.succeed(past)
        self.hold.succeed([former.hold])
        former.detach()

    @property
    def description(self) -> SessionDescription:
        """See `SessionLink.description`."""
        return self._description

    @property
    def lock(self) -> threading.RLock:
        """See `SessionLink.lock`."""
        return self._lock

    @property
    def carry(self) -> Carry:
        """See `SessionLink.carry`."""
        return self._carry

    @property
    def direct(self) -> DirectSteps | None:
        """See `SessionLink.direct`."""
        return self._direct

    @property
    def shards(self) -> tuple[RemoteLink, ...]:
        """Return the link itself: the session is not sharded."""
        return (self,)

    @property
    def retry(self) -> Retry:
        """The repetition of calls, for a link that repeats several sessions as one."""
        return self._route.calls.retry

    @property
    def applied_step(self) -> int:
        """The last step known to be applied."""
        return self.hold.session_step

    @property
    def worker(self) -> int | None:
        """See `SessionLink.worker`."""
        return self.hold.worker

    @property
    def last_result(self) -> step_pb2.StepResult | None:
        """See `SessionLink.last_result`."""
        return self._last_result

    @property
    def transport(self) -> TransportChoice | None:
        """See `SessionLink.transport`."""
        return self._route.choice

    def deadline(self, timeout: float | None) -> Deadline:
        """See `SessionLink.deadline`."""
        return self._route.calls.deadline(timeout)

    # --- streams -----------------------------------------------------------------------------------------

    def attach(self, deadline: Deadline, *, transport: str | None = None, take_over: bool = False) -> None:
        """See `SessionLink.attach`. After it, `applied_step` tells the outcome of a step in doubt."""
        self._settle(deadline)
        hold, before = self.hold, self._route.asked
        if transport is not None and transport != before:
            hold.detach()
            self._route.ask(transport)
        try:
            self._repeat(hold.take_over if take_over else hold.attach, deadline)
        except UnsupportedFeatureError:
            self._route.ask(before)
            raise
        self._doubts.forget_settled()
        if self._doubts.present is not None and hold.step_on_server == self._doubts.present.step:
            hold.applied_step = hold.step_on_server

    def make_good(self, deadline: Deadline) -> None:
        """Attach if need be, and make good what the server has lost; the caller holds the lock.

        Raises:
            StateLossError: the server has lost steps that are not kept.
            StepwireError: as `attach`.
        """
        self._settle(deadline)
        self._losses.make_good(deadline)
        self._doubts.forget_settled()

    def detach(self) -> None:
        """See `SessionLink.detach`."""
        self.hold.detach()

    def shared(self, deadline: Deadline) -> SharedArrays:
        """See `SessionLink.shared`."""
        self.attach(deadline)
        if self.hold.shared is None:
            raise self._route.no_shared_memory()
        return self.hold.shared

    def forget_writes(self) -> None:
        """See `SessionLink.forget_writes`."""
        if self.hold.shared is not None:
            self.hold.shared.forget_writes()

    # --- steps and state ---------------------------------------------------------------------------------

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """See `SessionLink.step`."""
        self._settle(deadline)
        call.begin.step = self._number(call, deadline)
        result = self.completed(call, deadline)
        undelivered(self.undelivered, call)
        if call.feed is not None:
            call.feed.undelivered = functools.partial(self.undelivered, call)
        return result

    def completed(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a call that has its number, and keep the account of its outcome.

        Raises:
            StepwireError: as `step`.
        """
        try:
            result = self.step_by_number(call, deadline)
        except StateLossError:  # the server knows less than the step
            raise
        except BaseException:
            self._doubts.failed(call)
            raise
        self._doubts.succeeded()
        return result

    def made_directly(self, step: DirectStep[Any], result: step_pb2.StepResult) -> bool:
        """See `StepsByNumber.made_directly`. A call in here would be a place for a handler."""
        if step.gave_way:
            return False
        hold = self.hold
        hold.applied_step = hold.step_on_server = result.step
        hold.durable_step = result.durable_step if result.durable_step > hold.durable_step else hold.durable_step
        self._last_result = result
        return True

    def undelivered(self, call: StepCall) -> None:
        """Put a step in doubt whose outcome reached nobody."""
        with self._lock:
            self._doubts.undelivered(call)

    def _settle(self, deadline: Deadline) -> None:
        """Settle a direct step that did not come to its end; the caller holds the lock."""
        if self._direct is not None:
            self._direct.settle(deadline)

    def step_by_number(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a call that has its number, until its reply is read.

        Raises:
            StepwireError: as `step`; the outcome is unknown to this link.
        """
        try:
            result = self._losses.send(call, deadline)
        except BaseException:
            self._carry.failed(call)
            raise
        self._window.keep(call)
        self._carry.applied(call, result)
        self._last_result = result
        return result

    def _number(self, call: StepCall, deadline: Deadline) -> int:
        """Return the number of a call, once a load and a step in doubt are settled.

        Raises:
            StepMismatchError: the call repeats a step whose outcome nobody can tell, or the session moved.
            SessionNotReadyError: another step is half applied.
            StepwireError: as `attach`.
        """
        hold = self.hold
        if hold.load_in_doubt or hold.token == 0:  # the server alone knows what is next
            self._repeat(hold.attach, deadline)
        self._doubts.forget_settled()
        self._doubts.untold.check(call)
        if (doubt := self._doubts.present) is not None:
            if doubt.covers(call):
                call.sent = True
                return doubt.step
            self._resolve(doubt, deadline)
        return hold.applied_step + 1

    def _resolve(self, doubt: Doubt, deadline: Deadline) -> None:
        """Learn the outcome of a step in doubt.

        Raises:
            SessionNotReadyError: the step is half applied.
            StepMismatchError: the session moved without this client.
            StepwireError: as `attach`.
        """
        hold = self.hold
        self._repeat(hold.attach, deadline)
        try:
            hold.check(doubt.step, sent=True)
        except StateLossError as loss:
            self._doubts.resolved(lost=True)
            self._losses.resend(loss, deadline)
            return
        if hold.unfinished_step:
            raise unfinished(hold.unfinished_step)
        self.await_open_round(doubt.step, None, deadline)
        self._doubts.resolved()

    def await_open_round(self, step: int, decide: Decide | None, deadline: Deadline) -> bool:
        """Wait for the round that has a contribution in doubt; see `open_round.await_open_round`."""
        return self._repeat(functools.partial(await_open_round, self.hold, step, decide), deadline)

    def pull_rows(self, rows: PulledRows, dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull_rows`."""
        return self._pulled(lambda calls, left: receive_pull(calls, self._description, {}, dtype, left, rows), deadline)

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull`."""
        return self._pulled(lambda calls, left: receive_pull(calls, self._description, targets, dtype, left), deadline)

    def _pulled(self, pull: Callable[[Calls, Deadline], state_pb2.PullHeader], end: Deadline) -> state_pb2.PullHeader:
        untold, way = self._doubts.untold.doubts, self._route.way
        attempt = functools.partial(self._repeat, lambda left: pull(way(left).calls, left), end)
        header = self._losses.read(attempt, lambda it: (it.step, it.load), end)
        self._doubts.untold.forget(untold)
        self.hold.pulled(header.step, header.load)
        return header

    def load(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.load`."""
        self._settle(deadline)
        if not self.hold.is_certain:
            self._repeat(self.hold.attach, deadline)
        once = functools.partial(load_by_number, self._route, self.hold, self._description, load, deadline)
        self._losses.mended(once, deadline)
        self._doubts.forget()

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.initialize`: of several workers' loads, and of a creation's that is repeated, one counts."""
        if self._description.message.ready:
            return
        if self._description.is_aggregated or not self.hold.is_certain:
            self._repeat(self.hold.attach, deadline)
        if not self.hold.applied_load:
            self.load(load._replace(as_one=True), deadline)

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> list[Any]:
        """See `SessionLink.ask`."""
        request.session_id = self._description.session_id
        return [self._route.calls.unary(method, request, response, deadline)]

    def make_sure(self, deadline: Deadline) -> None:
        """See `SessionLink.make_sure`."""
        if self._description.message.config.durability == session_pb2.DURABILITY_CHECKPOINT:  # else nothing gets lost
            self._losses.read(
                lambda: self._session(deadline), lambda found: (found.applied_step, found.applied_load), deadline
            )

    def info(self, deadline: Deadline) -> SessionInfo:
        """See `SessionLink.info`."""
        return SessionInfo.from_wire(self._session(deadline))

    def _session(self, deadline: Deadline) -> session_pb2.Session:
        session: session_pb2.Session = self.ask("GetSession", pb.GetSessionRequest(), pb.GetSessionResponse, deadline)[
            0
        ].session
        return session

    def statistics(self) -> SessionStatistics:
        """See `SessionLink.statistics`."""
        hold, doubt = self.hold, self._doubts.present
        return SessionStatistics(
            applied_step=hold.session_step,
            durable_step=hold.durable_step,
            attached=hold.attached,
            streams_opened=hold.streams_opened,
            step_in_doubt=None if doubt is None else doubt.step,
            reply_begun=doubt is not None and hold.answered_step == doubt.step,
            applied_load=hold.applied_load,
        )

    def close(self) -> None:
        """See `SessionLink.close`."""
        self.hold.detach()
        delete(self._route, self._description.session_id)

    def leave(self, seconds: float | None) -> None:
        """See `SessionLink.leave`."""
        self.hold.detach()
        if seconds is not None:
            delete_held(self._route, self._description.session_id, self.hold.token, max(seconds, _LEAST_SECONDS))

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        return repeated(self._route, self.hold, attempt, deadline)
