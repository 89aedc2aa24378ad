"""The link to a session on one server: steps by number, pulls, loads, and all of them again after a break."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import RowTarget
from stepwire.connection.channel import Calls
from stepwire.connection.errands import undelivered
from stepwire.connection.retry import Deadline, Retry
from stepwire.errors import StateLossError, UnsupportedFeatureError
from stepwire.links.deletion import delete, delete_held
from stepwire.links.hold import Hold
from stepwire.links.link import Load, SessionLink
from stepwire.links.losses import Losses
from stepwire.links.open_round import await_open_round
from stepwire.links.pull_and_load import receive_pull, send_load
from stepwire.links.repetition import repeated
from stepwire.links.window import ReplayWindow
from stepwire.results import SessionInfo, SessionStatistics, TransportChoice
from stepwire.steps.call import Decide, StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.steps.doubt import Doubt, UntoldSteps, unfinished
from stepwire.transports.route import Route
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2, state_pb2, step_pb2

__all__ = ["RemoteLink"]

_T = TypeVar("_T")
_LEAST_SECONDS = 1e-3


class RemoteLink(SessionLink):
    """The link to a session on one server."""

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
        self._description = description
        self._carry = Carry(description.message, description.packer.layout.size, error_feedback=error_feedback)
        self._hold = Hold(route, description, token, worker)
        self._doubt: Doubt | None = None
        self._untold = UntoldSteps()
        self._window = ReplayWindow(description, self._hold, window_bytes)
        self._load = self._hold.applied_load  # that the doubt and everything carried belong to
        self._last_result: step_pb2.StepResult | None = None
        self._lock = threading.RLock()
        self._losses = Losses(route, self._hold, self._window, self._lock, self._forget_lost)

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
    def shards(self) -> tuple[SessionLink, ...]:
        """Return the link itself: the session is not sharded."""
        return (self,)

    @property
    def hold(self) -> Hold:
        """The hold of the session's worker, for a link that steps several sessions as one."""
        return self._hold

    @property
    def retry(self) -> Retry:
        """The repetition of calls, for a link that repeats several sessions as one."""
        return self._route.calls.retry

    @property
    def target(self) -> str:
        """The target that the client connected to."""
        return self._route.calls.target

    @property
    def applied_step(self) -> int:
        """The last step known to be applied."""
        return self._hold.session_step

    @property
    def worker(self) -> int | None:
        """See `SessionLink.worker`."""
        return self._hold.worker

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
        hold, before = self._hold, self._route.asked
        if transport is not None and transport != before:
            hold.detach()
            self._route.ask(transport)
        try:
            self._repeat(hold.take_over if take_over else hold.attach, deadline)
        except UnsupportedFeatureError:
            self._route.ask(before)
            raise
        self._forget_settled()
        if self._doubt is not None and hold.step_on_server == self._doubt.step:
            hold.applied_step = hold.step_on_server

    def make_good(self, deadline: Deadline) -> None:
        """Attach if need be, and make good what the server has lost; the caller holds the lock.

        Raises:
            StateLossError: the server has lost steps that are not kept.
            StepwireError: as `attach`.
        """
        self._losses.make_good(deadline)
        self._forget_settled()

    def detach(self) -> None:
        """See `SessionLink.detach`."""
        self._hold.detach()

    def shared(self, deadline: Deadline) -> SharedArrays:
        """See `SessionLink.shared`."""
        self.attach(deadline)
        if self._hold.shared is None:
            raise self._route.no_shared_memory()
        return self._hold.shared

    def forget_writes(self) -> None:
        """See `SessionLink.forget_writes`."""
        if self._hold.shared is not None:
            self._hold.shared.forget_writes()

    # --- steps -------------------------------------------------------------------------------------------

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """See `SessionLink.step`."""
        call.begin.step = self._number(call, deadline)
        try:
            result = self.step_by_number(call, deadline)
        except StateLossError:  # the step was not sent
            raise
        except BaseException:
            self._doubt = Doubt.after(call, self._hold.acquisitions)
            raise
        self._doubt = None
        self._untold.forget()
        undelivered(functools.partial(self._undelivered, call))
        if call.feed is not None:
            call.feed.undelivered = functools.partial(self._undelivered, call)
        return result

    def _undelivered(self, call: StepCall) -> None:
        """Put a step in doubt whose outcome reached nobody: the same gradient again is the same step."""
        with self._lock:
            hold = self._hold
            if self._doubt is None and (hold.applied_step, hold.applied_load) == (call.begin.step, call.begin.load):
                self._carry.failed(call)
                self._doubt = Doubt.after(call, hold.acquisitions)

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

    def _forget_lost(self) -> None:
        """Forget everything that belongs to a state that the server has lost."""
        self._load, self._doubt = self._hold.applied_load, None
        self._carry.loaded()
        self._window.clear()
        self._untold.forget()

    def _number(self, call: StepCall, deadline: Deadline) -> int:
        """Return the number of a call, once a load and a step in doubt are settled.

        Raises:
            StepMismatchError: the call repeats a step whose outcome nobody can tell, or the session moved.
            SessionNotReadyError: another step is half applied.
            StepwireError: as `attach`.
        """
        hold = self._hold
        if hold.load_in_doubt or hold.token == 0:  # the server alone knows what is next
            self._repeat(hold.attach, deadline)
        self._forget_settled()
        self._untold.check(call)
        if self._doubt is not None:
            if self._doubt.covers(call):
                call.sent = True
                return self._doubt.step
            self._resolve(self._doubt, deadline)
        return hold.applied_step + 1

    def _forget_settled(self) -> None:
        """Forget a step in doubt that a load has replaced, or that another client's hold has settled or hidden."""
        hold, doubt = self._hold, self._doubt
        if hold.applied_load != self._load:
            self._forget_lost()
        elif doubt is not None and doubt.acquisitions != hold.acquisitions:
            self._doubt = None
            if hold.step_on_server < doubt.step:
                doubt.resolve(applied=False)
            else:  # by this client, or by another one
                self._untold.add(doubt)

    def _resolve(self, doubt: Doubt, deadline: Deadline) -> None:
        """Learn the outcome of a step in doubt.

        Raises:
            SessionNotReadyError: the step is half applied.
            StepMismatchError: the session moved without this client.
            StepwireError: as `attach`.
        """
        hold = self._hold
        self._repeat(hold.attach, deadline)
        try:
            hold.check(doubt.step, sent=True)
        except StateLossError as loss:
            self._doubt = None
            doubt.resolve(applied=False)
            self._losses.resend(loss, deadline)
            return
        if hold.unfinished_step:
            raise unfinished(hold.unfinished_step)
        self.await_open_round(doubt.step, None, deadline)
        hold.applied_step = hold.step_on_server
        doubt.resolve(applied=hold.step_on_server == doubt.step)
        self._doubt = None

    def await_open_round(self, step: int, decide: Decide | None, deadline: Deadline) -> bool:
        """Wait for the round that has a contribution in doubt; see `open_round.await_open_round`."""
        return self._repeat(functools.partial(await_open_round, self._hold, step, decide), deadline)

    # --- state -------------------------------------------------------------------------------------------

    def pull_rows(self, rows: Sequence[RowTarget], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull_rows`."""
        return self._pulled(lambda calls, left: receive_pull(calls, self._description, {}, dtype, left, rows), deadline)

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull`."""
        return self._pulled(lambda calls, left: receive_pull(calls, self._description, targets, dtype, left), deadline)

    def _pulled(self, pull: Callable[[Calls, Deadline], state_pb2.PullHeader], end: Deadline) -> state_pb2.PullHeader:
        untold, way = self._untold.doubts, self._route.way
        attempt = functools.partial(self._repeat, lambda left: pull(way(left).calls, left), end)
        header = self._losses.read(attempt, lambda it: (it.step, it.load), end)
        self._untold.forget(untold)
        self._hold.pulled(header.step, header.load)
        return header

    def load(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.load`."""
        if not self._hold.is_certain:
            self._repeat(self._hold.attach, deadline)
        self._losses.mended(lambda: self._load_once(load, deadline), deadline)
        self._forget_lost()

    def _load_once(self, load: Load, deadline: Deadline) -> None:
        """Send a load, until it is committed.

        Raises:
            StateLossError: the server has lost steps or loads, and the load does not bring everything.
            StepwireError: as `load`.
        """
        hold, description, opening = self._hold, self._description, load.opening()
        opening.session_id, opening.load = description.session_id, hold.applied_load + 1

        def attempt(left: Deadline) -> session_pb2.Session:
            if hold.epoch == 0 or not hold.is_certain:
                hold.attach(left)
            hold.check_kept(steps=not load.whole)
            if load.step is None and not description.is_aggregated:
                opening.step = hold.step_on_server  # so that a load that arrives after a step is refused
            opening.attach_token, opening.epoch, opening.worker = hold.token, hold.epoch, hold.worker or 0
            return send_load(self._route.way(left).calls, opening, load, description, left)

        try:
            session = self._repeat(attempt, deadline)
        except StateLossError:  # the load was not committed: the server knows none of its number
            raise
        except BaseException:
            hold.load_failed(opening.load)
            raise
        hold.loaded(opening.load, session.applied_step)

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.initialize`: of several workers' loads, and of a creation's that is repeated, one counts."""
        if self._description.message.ready:
            return
        if self._description.is_aggregated or not self._hold.is_certain:
            self._repeat(self._hold.attach, deadline)
        if not self._hold.applied_load:
            self.load(load, deadline)

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> list[Any]:
        """See `SessionLink.ask`."""
        request.session_id = self._description.session_id
        return [self._route.calls.unary(method, request, response, max(deadline.remaining(), _LEAST_SECONDS))]

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
        (response,) = self.ask("GetSession", pb.GetSessionRequest(), pb.GetSessionResponse, deadline)
        session: session_pb2.Session = response.session
        return session

    def statistics(self) -> SessionStatistics:
        """See `SessionLink.statistics`."""
        hold, doubt = self._hold, self._doubt
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
        self._hold.detach()
        delete(self._route, self._description.session_id)

    def leave(self, seconds: float | None) -> None:
        """See `SessionLink.leave`."""
        self._hold.detach()
        if seconds is not None:
            delete_held(self._route, self._description.session_id, self._hold.token, max(seconds, _LEAST_SECONDS))

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        return repeated(self._route, self._hold, attempt, deadline)
