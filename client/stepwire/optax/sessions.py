"""The sessions of this process that optax states speak of, and the numbering of their steps. NumPy alone.

A JAX program knows its session by the id in its state, which is data: it goes through `jit`, into checkpoints and back.
What belongs to the id, the session itself and its connection, is found here.

Numbers make a step happen once. A state says how many steps it has seen; the session knows how many it has taken, and
the server again. JAX may run a callback twice, and a program may use a state twice; then the step with this number was
taken before. If it was with the same gradient, its outcome is given again. If not, the two cannot both be step n, and
the program is told. What the gradient was is known by a fingerprint, the sum of each tensor's bits: a pass at the speed
of memory. Keeping the gradient would cost its memory, and a cryptographic hash several times the pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.client import Client
from stepwire.errors import InvalidRequestError, StepMismatchError
from stepwire.optax.connection import Connection
from stepwire.session import Session

__all__ = ["Held", "adopt", "client", "fingerprint", "held", "is_held", "known", "let_go"]

Fingerprint = tuple[Any, ...]


class _Taken(NamedTuple):
    """The last step that was sent."""

    step: int
    gradient: Fingerprint


class Held:
    """A session and what its last step was. Thread-safe.

    Attributes:
        session: the session, attached.
        names: its tensors, in the order of the leaves of the parameters.
    """

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        """Attach, so that nobody else moves the session."""
        session.attach()
        self.session = session
        self.names = tuple(names)
        self._taken: _Taken | None = None
        self._lock = threading.Lock()

    def take(
        self, count: int, gradients: Sequence[npt.NDArray[Any]], lr: float | None, reply_dtype: npt.DTypeLike
    ) -> list[npt.NDArray[Any]]:
        """Take the step after `count`, or give the outcome of that step again; return the parameters.

        Raises:
            StepMismatchError: the state is not the one that the session's next step follows on.
            StepwireError: as `Session.step`.
        """
        with self._lock:
            step, applied = count + 1, self.session.applied_step
            this = _Taken(step, fingerprint(gradients, lr))
            if step == applied and self._taken == this:
                return self._ordered(self.session.pull(dtype=reply_dtype))
            if step != applied + 1:
                raise self._out_of_turn(count, applied)
            before, self._taken = self._taken, this
            named = dict(zip(self.names, gradients, strict=True))
            answer = self._ordered(self.session.step(named, lr=lr, reply_dtype=reply_dtype))
            if before is not None and before.step == step and before != this:
                self._check_taken_now(step, before)
            return answer

    def _check_taken_now(self, step: int, before: _Taken) -> None:
        """Refuse the outcome of a step that failed before with another gradient, and was applied after all."""
        result = self.session.last_result
        if result is not None and result.replayed:
            self._taken = before
            raise StepMismatchError(
                f"step {step} failed without an answer, and was taken again with another gradient; it turned out that "
                "it had been applied with the first. Go on from there: "
                "`params, state = tx.resume(session_id, params)`",
                metadata={"actual_step": step, "expected_step": step + 1},
            )

    def _ordered(self, named: Any) -> list[npt.NDArray[Any]]:
        return [named[name] for name in self.names]

    def _out_of_turn(self, count: int, applied: int) -> StepMismatchError:
        if count + 1 == applied and self._taken is not None:
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


def fingerprint(gradients: Sequence[npt.NDArray[Any]], lr: float | None) -> Fingerprint:
    """Return what tells two steps apart: the sums of the gradients' bits, tensor by tensor, and the learning rate."""
    return lr, *(_sum_of_bits(gradient) for gradient in gradients)


def _sum_of_bits(array: npt.NDArray[Any]) -> int:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(raw) - len(raw) % 8
    words = raw[:whole].view(np.uint64)
    return int(np.add.reduce(words)) + int.from_bytes(raw[whole:].tobytes(), "little")


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
