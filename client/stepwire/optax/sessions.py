"""The sessions of this process that optax states speak of, and the numbering of their steps. NumPy alone.

A JAX program knows its session by the id in its state, which is data: it goes through `jit`, into checkpoints and back.
What belongs to the id, the session itself and its connection, is found here.

Numbers make a step happen once. A state says how many steps it has seen; the session knows how many it has applied, and
so does the server. JAX may run a callback twice, and a program may use a state twice. Then the step of this number was
applied before. With the same gradient its outcome is given again. With another gradient both cannot be step n, and the
program gets an error. The fingerprint of `stepwire.steps.doubt` tells gradients apart. A large gradient is
fingerprinted while its step is under way, so that the step does not wait for the fingerprint.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from stepwire.client import Client
from stepwire.errors import InvalidRequestError, StepMismatchError
from stepwire.optax.connection import Connection
from stepwire.session import Session
from stepwire.steps.doubt import Fingerprint, fingerprint_of_arrays

__all__ = ["Held", "adopt", "client", "held", "is_held", "known", "let_go"]

_LARGE_BYTES: Final = 1 << 20


class _Step(NamedTuple):
    """The last step that was sent.

    Attributes:
        step: its number.
        fingerprint: the fingerprint of its gradient.
        lr: its learning rate.
    """

    step: int
    fingerprint: Fingerprint
    lr: float | None


class Held:
    """A session and its last step. Thread-safe.

    Attributes:
        session: the session, attached.
        names: its tensors, in the order of the leaves of the parameters.
    """

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        """Attach, so that nobody else moves the session."""
        session.attach()
        self.session = session
        self.names = tuple(names)
        self._last: _Step | None = None
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
                if (given := self._again(_Step(step, fingerprint_of_arrays(gradients), lr), reply_dtype)) is not None:
                    return given
            elif step != applied + 1:
                raise self._out_of_turn(count, applied)
            return self._apply(step, gradients, lr, reply_dtype)

    def _again(self, this: _Step, reply_dtype: npt.DTypeLike) -> list[npt.NDArray[Any]] | None:
        """Return the outcome of the last step for the same step; None if its number is still to be applied.

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
            f"step {this.step} failed without a reply, and was taken again with another gradient; it turned out that "
            "it had been applied with the first. Go on from there: `params, state = tx.resume(session_id, params)`",
            metadata={"actual_step": this.step, "expected_step": this.step + 1},
        )

    def _apply(
        self, step: int, gradients: Sequence[npt.NDArray[Any]], lr: float | None, reply_dtype: npt.DTypeLike
    ) -> list[npt.NDArray[Any]]:
        named = dict(zip(self.names, gradients, strict=True))
        if sum(gradient.nbytes for gradient in gradients) < _LARGE_BYTES:
            self._last = _Step(step, fingerprint_of_arrays(gradients), lr)
            return self._ordered(self.session.step(named, lr=lr, reply_dtype=reply_dtype))
        reply = self.session.step_async(named, lr=lr, reply_dtype=reply_dtype)
        try:
            self._last = _Step(step, fingerprint_of_arrays(gradients), lr)
        finally:
            reply.exception()  # the gradients belong to the step until it is over
        return self._ordered(reply.result())

    def _ordered(self, named: Any) -> list[npt.NDArray[Any]]:
        return [named[name] for name in self.names]

    def _out_of_turn(self, count: int, applied: int) -> StepMismatchError:
        if count + 1 == applied and self._last is not None:
            what = "that step has been taken with another gradient: the same state was used for two updates"
        elif count < applied:
            what = "the state is an old one"
        else:
            what = "the state is ahead of it"
        return StepMismatchError(
            f"the optax state has seen {count} steps, and the session {self.session.session_id} is at step {applied}: "
            f"{what}. Use the state that the last update returned, or go on from where the session is: "
            "`params, state = tx.resume(session_id, params)`",
            metadata={"expected_step": applied + 1, "actual_step": count + 1},
        )


# --- the sessions of this process -------------------------------------------------------------------------------

_lock = threading.RLock()
_held: dict[str, tuple[Held, Connection]] = {}
_clients: dict[Connection, Client] = {}


def client(connection: Connection) -> Client:
    """Return the client of a connection, opened when first needed."""
    with _lock:
        if (known := _clients.get(connection)) is None:
            known = _clients[connection] = connection.open()
        return known


def adopt(session: Session, names: Sequence[str], connection: Connection) -> Held:
    """Hold a session from now on."""
    new = Held(session, names)
    with _lock:
        _held[session.session_id] = new, connection
    return new


def held(session_id: str, names: Sequence[str], connection: Connection) -> Held:
    """Return a session that is held, or find it on the server: of a state that came from another process.

    Raises:
        SessionNotFoundError: it does not exist.
        StepwireError: as `Client.session`.
    """
    with _lock:  # for all of it: two that find one session would fence each other
        if (known := _held.get(session_id)) is not None:
            return known[0]
        return adopt(client(connection).session(session_id), names, connection)


def is_held(session_id: str) -> bool:
    """Tell whether a session is held."""
    return session_id in _held


def known(session_id: str) -> Held:
    """Return a session that is held.

    Raises:
        InvalidRequestError: it is not: closed, or of another process.
    """
    with _lock:
        if session_id not in _held:
            raise InvalidRequestError(
                f"state: this process holds no session {session_id!r}: it was closed, or comes from another process; "
                "`params, state = tx.resume(session_id, params)` takes it over",
                metadata={"field": "state"},
            )
        return _held[session_id][0]


def let_go(session_id: str) -> None:
    """Hold a session no more, and close the connection that was opened for it and serves no other."""
    with _lock:
        if (known := _held.pop(session_id, None)) is None:
            return
        connection = known[1]
        if not connection.owned or any(other == connection for _, other in _held.values()):
            return
        left = _clients.pop(connection, None)
    if left is not None:
        left.close()
