"""The sessions of this process by the ids in optax states, and the numbering of their steps. NumPy alone.

A JAX program knows its session by the id in its state. The state is data, which goes through `jit` and into
checkpoints. This module finds the session and the connection of an id.

Numbers make a step happen once. A state has the number of its steps; so have the session and the server. JAX may run a
callback twice, and a program may use a state twice. Then the step of that number is applied already. With the same
gradient and parameters, the call returns the same result again. With others, only one of the two can be step n, and the
call raises an error. The fingerprint of `stepwire.steps.doubt` tells arrays apart. Large arrays are fingerprinted while
their step is under way, so that the step does not wait for the fingerprint.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeVar

import numpy.typing as npt

from stepwire.client import Client
from stepwire.connection.errands import by_errand
from stepwire.errors import InvalidRequestError, SessionNotFoundError, StepMismatchError
from stepwire.optax.connection import Connection
from stepwire.optax.program import ProgramParameters
from stepwire.results import Snapshot
from stepwire.session import Session
from stepwire.steps.doubt import Fingerprint, fingerprint_of_arrays

__all__ = ["ProgramStep", "TrackedSession", "client", "find", "forget", "is_tracked", "track", "tracked"]

_LARGE_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramStep:
    """A step as the program asks for it.

    Attributes:
        count: the number of steps before it, from the state.
        gradients: the gradients, in the order of the leaves.
        parameters: the parameters of the program, in the same order.
        lr: the learning rate; None for the session's own.
        exact: True if the program gets the new parameters themselves, and not their differences.
    """

    count: int
    gradients: Sequence[npt.NDArray[Any]]
    parameters: Sequence[npt.NDArray[Any]]
    lr: float | None = None
    exact: bool = True

    def sent(self) -> _SentStep:
        """Return the record of this step."""
        gradients, parameters = fingerprint_of_arrays(self.gradients), fingerprint_of_arrays(self.parameters)
        return _SentStep(self.count + 1, gradients, parameters, self.lr)

    @property
    def is_large(self) -> bool:
        """True if the fingerprints are worth a thread of their own."""
        return sum(gradient.nbytes for gradient in self.gradients) >= _LARGE_BYTES


class _SentStep(NamedTuple):
    """The last step that was sent.

    Attributes:
        step: its number.
        gradients: the fingerprint of its gradients.
        parameters: the fingerprint of the program's parameters.
        lr: its learning rate.
    """

    step: int
    gradients: Fingerprint
    parameters: Fingerprint
    lr: float | None


class TrackedSession:
    """A session, the parameters of its program, and the record of its last step. Thread-safe.

    Attributes:
        session: the session, attached.
    """

    def __init__(
        self, session: Session, names: Sequence[str], parameters: Sequence[npt.NDArray[Any]] | None = None
    ) -> None:
        """Attach to the session, so that no other client steps it.

        Args:
            session: the session.
            names: the names of its tensors, in the order of the leaves of the parameters.
            parameters: the parameters of the program, the session's in the dtypes of the program, which are kept; None
                if they are unknown.
        """
        session.attach()
        self.session = session
        self._program = ProgramParameters(session, names, parameters)
        self._last: _SentStep | None = None
        self._lock = threading.Lock()

    def step(self, given: ProgramStep, reply_dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """Apply the step after the state's, or give the outcome of that step again; return the parameters.

        Parameters that other code has changed since the last step are sent first.

        Raises:
            StepMismatchError: the session's next step does not follow on the state.
            StepwireError: as `Session.step` and `Session.load`.
        """
        with self._lock:
            step, applied = given.count + 1, self.session.applied_step
            reply = None
            if self._last is not None and self._last.step == step:
                reply = self._again(given, given.sent(), reply_dtype)
            elif step != applied + 1:
                raise self._out_of_turn(given.count, applied)
            if reply is None:
                reply = self._apply(given, reply_dtype)
            self._program.stepped(given.parameters, reply, exact=given.exact)
            return reply

    @by_errand
    def state_at(self, count: int) -> Snapshot:
        """Return the state of the session.

        Raises:
            StepMismatchError: the session is not at this count.
            StepwireError: as `Session.state`.
        """
        with self._lock:
            snapshot = self.session.state()
            if snapshot.step != count:
                raise self._out_of_turn(count, snapshot.step)
            return snapshot

    def _again(self, given: ProgramStep, this: _SentStep, reply_dtype: npt.DTypeLike) -> list[npt.NDArray[Any]] | None:
        """Return the parameters again for the same step; None if its number is still to be applied.

        Raises:
            StepMismatchError: the number was applied with another gradient.
        """
        applied = self.session.applied_step
        if applied == this.step and self._last == this:
            return self._ordered(self.session.pull(dtype=reply_dtype))
        if applied != this.step - 1:
            raise self._out_of_turn(given.count, applied, this)
        if self._last == this:
            return None
        self.session.attach()  # tells whether the step that failed was applied
        if self.session.applied_step < this.step:
            return None
        raise StepMismatchError(
            f"step {this.step} failed without a reply, and was sent again with {self._difference(this)}, but the "
            "server had applied it with the first. Continue from that step: "
            "`params, state = tx.resume(session_id, params)`",
            metadata={"actual_step": this.step, "expected_step": this.step + 1},
        )

    def _apply(self, given: ProgramStep, reply_dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        if self._program.upload_changes(given.parameters, reply_dtype):
            self._last = None  # the parameters after that step are replaced
        named = dict(zip(self._program.names, given.gradients, strict=True))
        if not given.is_large:
            self._last = given.sent()
            return self._ordered(self.session.step(named, lr=given.lr, reply_dtype=reply_dtype))
        reply = self.session.step_async(named, lr=given.lr, reply_dtype=reply_dtype)
        try:
            self._last = given.sent()
        finally:
            reply.exception()  # the gradients belong to the step until it is over
        return self._ordered(reply.result())

    def _ordered(self, named: Any) -> list[npt.NDArray[Any]]:
        return [named[name] for name in self._program.names]

    def _difference(self, this: _SentStep) -> str:
        """Name the difference between this step and the last one of its number."""
        assert self._last is not None
        same_gradient = self._last.gradients == this.gradients and self._last.lr == this.lr
        return "other parameters" if same_gradient else "another gradient"

    def _out_of_turn(self, count: int, applied: int, this: _SentStep | None = None) -> StepMismatchError:
        if count + 1 == applied and this is not None:
            problem = f"that step was applied with {self._difference(this)}, because one state was used for two updates"
        elif count < applied:
            problem = "the state is an old one"
        else:
            problem = "the state is ahead of the session"
        return StepMismatchError(
            f"the optax state is at step {count}, and the session {self.session.own_id} is at step {applied}: "
            f"{problem}. Use the state that the last update returned, or continue from the session's step: "
            "`params, state = tx.resume(session_id, params)`, or from a checkpoint: "
            "`state = tx.from_arrays(arrays, params)`",
            metadata={"expected_step": applied + 1, "actual_step": count + 1},
        )


# --- the sessions of this process -------------------------------------------------------------------------------

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

_lock = threading.Lock()
"""The lock of the tables below. No code calls a server, or waits for one, while it holds this lock."""

_tracked: dict[str, tuple[TrackedSession, Connection]] = {}
_clients: dict[Connection, Client] = {}
_finding: dict[str, Future[tuple[TrackedSession, Connection]]] = {}
_opening: dict[Connection, Future[Client]] = {}
_finders: Counter[Connection] = Counter()
"""The searches for sessions that are under way over each connection, which stays open for them."""


def _once(known: dict[_K, _V], under_way: dict[_K, Future[_V]], key: _K, make: Callable[[], _V]) -> _V:
    """Return the value of a key; the first caller makes it, and others of the same key wait for that caller.

    Raises:
        StepwireError: the error of the caller that made the value.
    """
    with _lock:
        if key in known:
            return known[key]
        if (other := under_way.get(key)) is None:
            mine = under_way[key] = Future()
    if other is not None:
        return other.result()
    try:
        value = make()
    except BaseException as error:
        with _lock:
            del under_way[key]
        mine.set_exception(error)
        raise
    with _lock:
        del under_way[key]
        known[key] = value
    mine.set_result(value)
    return value


@by_errand
def client(connection: Connection) -> Client:
    """Return the client of a connection, opened when first needed."""
    return _once(_clients, _opening, connection, connection.open)


@by_errand
def track(
    session: Session, names: Sequence[str], connection: Connection, parameters: Sequence[npt.NDArray[Any]]
) -> TrackedSession:
    """Track a session from now on; `parameters` are the program's, see `TrackedSession`."""
    new = TrackedSession(session, names, parameters)
    with _lock:
        _tracked[session.own_id] = new, connection
    return new


def find(session_id: str, names: Sequence[str], connection: Connection) -> TrackedSession:
    """Return a tracked session, or track a session of the server whose state comes from another process.

    Raises:
        SessionNotFoundError: the session does not exist.
        StepwireError: as `Client.session`.
    """

    def attached() -> tuple[TrackedSession, Connection]:
        try:
            session = client(connection).session(session_id)
        except SessionNotFoundError as error:
            raise SessionNotFoundError(
                f"{error}: `state = tx.from_arrays(arrays, params)`, with the arrays of a checkpoint",
                metadata=error.metadata,
            ) from None
        return TrackedSession(session, names), connection

    with _lock:
        if (known := _tracked.get(session_id)) is not None:
            return known[0]
        _finders[connection] += 1
    try:
        # Two threads that attach to the same session would fence each other.
        return _once(_tracked, _finding, session_id, attached)[0]
    finally:
        with _lock:
            _finders[connection] -= 1


def is_tracked(session_id: str) -> bool:
    """Tell whether a session is tracked."""
    return session_id in _tracked


def tracked(session_id: str) -> TrackedSession:
    """Return a tracked session.

    Raises:
        InvalidRequestError: the session is not tracked: it was closed, or is of another process.
    """
    with _lock:
        if session_id not in _tracked:
            raise InvalidRequestError.of(
                "state",
                f"this process has no session {session_id!r}, which was closed or comes from another process; call "
                "`params, state = tx.resume(session_id, params)`",
            )
        return _tracked[session_id][0]


def forget(session_id: str) -> None:
    """Track a session no more, and close its connection if this module opened it and no other session uses it."""
    with _lock:
        if (known := _tracked.pop(session_id, None)) is None:
            return
        connection = known[1]
        used = _finders[connection] or any(other == connection for _, other in _tracked.values())
        if used or not connection.owned:
            return
        left = _clients.pop(connection, None)
    if left is not None:
        left.close()
