"""The sessions of this process by the ids in optax states, and the numbering of their steps. NumPy alone.

A JAX program knows its session by the id in its state. The state is data, which goes through `jit` and into
checkpoints. This module finds the session and the connection of an id.

Numbers make a step happen once. A state has the number of its steps; so have the session and the server. JAX may run a
callback twice, and a program may use a state twice. Then the step of that number is applied already. With the same
gradient, the call returns the same parameters again. With another gradient, only one of the two can be step n, and the
call raises an error. The fingerprint of `stepwire.steps.doubt` tells gradients apart. A large gradient is fingerprinted
while its step is under way, so that the step does not wait for the fingerprint.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeVar

import numpy.typing as npt

from stepwire.client import Client
from stepwire.errors import InvalidRequestError, StepMismatchError
from stepwire.optax.connection import Connection
from stepwire.session import Session
from stepwire.steps.doubt import Fingerprint, fingerprint_of_arrays

__all__ = ["TrackedSession", "client", "find", "forget", "is_tracked", "track", "tracked"]

_LARGE_BYTES: Final = 1 << 20


class _SentStep(NamedTuple):
    """The last step that was sent.

    Attributes:
        step: its number.
        fingerprint: the fingerprint of its gradient.
        lr: its learning rate.
    """

    step: int
    fingerprint: Fingerprint
    lr: float | None


class TrackedSession:
    """A session and the record of its last step. Thread-safe.

    Attributes:
        session: the session, attached.
        names: the names of its tensors, in the order of the leaves of the parameters.
    """

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        """Attach to the session, so that no other client steps it."""
        session.attach()
        self.session = session
        self.names = tuple(names)
        self._last: _SentStep | None = None
        self._lock = threading.Lock()

    def step(
        self, count: int, gradients: Sequence[npt.NDArray[Any]], lr: float | None, reply_dtype: npt.DTypeLike
    ) -> list[npt.NDArray[Any]]:
        """Apply the step after `count`, or give the outcome of that step again; return the parameters.

        Raises:
            StepMismatchError: the session's next step does not follow on the state.
            StepwireError: as `Session.step`.
        """
        with self._lock:
            step, applied = count + 1, self.session.applied_step
            if self._last is not None and self._last.step == step:
                if (
                    given := self._again(_SentStep(step, fingerprint_of_arrays(gradients), lr), reply_dtype)
                ) is not None:
                    return given
            elif step != applied + 1:
                raise self._out_of_turn(count, applied)
            return self._apply(step, gradients, lr, reply_dtype)

    def _again(self, this: _SentStep, reply_dtype: npt.DTypeLike) -> list[npt.NDArray[Any]] | None:
        """Return the parameters again for the same step; None if its number is still to be applied.

        Raises:
            StepMismatchError: the number was applied with another gradient.
        """
        applied = self.session.applied_step
        if applied == this.step and self._last == this:
            return self._ordered(self.session.pull(dtype=reply_dtype))
        if applied != this.step - 1:
            raise self._out_of_turn(this.step - 1, applied)
        if self._last == this:
            return None
        self.session.attach()  # tells whether the step that failed was applied
        if self.session.applied_step < this.step:
            return None
        raise StepMismatchError(
            f"step {this.step} failed without a reply, and was sent again with another gradient, but the server had "
            "applied it with the first. Continue from that step: `params, state = tx.resume(session_id, params)`",
            metadata={"actual_step": this.step, "expected_step": this.step + 1},
        )

    def _apply(
        self, step: int, gradients: Sequence[npt.NDArray[Any]], lr: float | None, reply_dtype: npt.DTypeLike
    ) -> list[npt.NDArray[Any]]:
        named = dict(zip(self.names, gradients, strict=True))
        if sum(gradient.nbytes for gradient in gradients) < _LARGE_BYTES:
            self._last = _SentStep(step, fingerprint_of_arrays(gradients), lr)
            return self._ordered(self.session.step(named, lr=lr, reply_dtype=reply_dtype))
        reply = self.session.step_async(named, lr=lr, reply_dtype=reply_dtype)
        try:
            self._last = _SentStep(step, fingerprint_of_arrays(gradients), lr)
        finally:
            reply.exception()  # the gradients belong to the step until it is over
        return self._ordered(reply.result())

    def _ordered(self, named: Any) -> list[npt.NDArray[Any]]:
        return [named[name] for name in self.names]

    def _out_of_turn(self, count: int, applied: int) -> StepMismatchError:
        if count + 1 == applied and self._last is not None:
            problem = "that step was applied with another gradient, because one state was used for two updates"
        elif count < applied:
            problem = "the state is an old one"
        else:
            problem = "the state is ahead of the session"
        return StepMismatchError(
            f"the optax state is at step {count}, and the session {self.session.session_id} is at step {applied}: "
            f"{problem}. Use the state that the last update returned, or continue from the session's step: "
            "`params, state = tx.resume(session_id, params)`",
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


def client(connection: Connection) -> Client:
    """Return the client of a connection, opened when first needed."""
    return _once(_clients, _opening, connection, connection.open)


def track(session: Session, names: Sequence[str], connection: Connection) -> TrackedSession:
    """Track a session from now on."""
    new = TrackedSession(session, names)
    with _lock:
        _tracked[session.session_id] = new, connection
    return new


def find(session_id: str, names: Sequence[str], connection: Connection) -> TrackedSession:
    """Return a tracked session, or track a session of the server whose state comes from another process.

    Raises:
        SessionNotFoundError: the session does not exist.
        StepwireError: as `Client.session`.
    """

    def attached() -> tuple[TrackedSession, Connection]:
        return TrackedSession(client(connection).session(session_id), names), connection

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
