"""The turns of an engine: the sessions of a device use it one pass after another, each its share.

A pass over a range of a session's arrays needs a turn. A turn lasts for one call of the engine, some milliseconds, and
its holder waits for no other session. So a thread may wait for a turn under any lock, and a commit goes on to its end
however many wait. Between two passes of a large step others have the engine.

**Order.** Deficit round robin by bytes (`rotation`) over tenants, then over the two kinds of a tenant's sessions, then
over the sessions of a kind. Sessions whose step is about one pass are small, and those whose step is many passes are
large. The kinds share a tenant's turns in halves. With one kind alone, a large step would wait after each of its passes
for a step of each of 256 small sessions.

**Threads.** A server with hundreds of busy streams has as many threads that want the interpreter's lock. A small step
asks for that lock about ten times, a large one hundreds of times, and each time waits for all other threads. A thread
that waits for a turn does not want the lock. So few threads compete for it.

A turn that is free costs two locks that nobody else holds. There is no thread and no timer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from time import perf_counter
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError
from stepwire_server.devices.rotation import Queue, Rotation, TurnRequest
from stepwire_server.engines.protocol import EngineState, Gradient

__all__ = ["QUANTUM_BYTES", "FairShare", "Flow", "ShareStatistics", "parse_weights"]

QUANTUM_BYTES: Final = 64 << 20
"""The bytes of a sharer in one round: about two passes over the chunk of a message, with all slots of Adam."""

_TURN_BYTES: Final = 8 << 20
"""The price of a turn beside its bytes: an engine moves about as many while a turn passes from thread to thread."""

_TURNS: Final = 2
"""The turns at a time. While the holder of one waits for the interpreter, that of the other computes."""


class ShareStatistics(NamedTuple):
    """The turns of an engine at one moment.

    Attributes:
        held: the turns that are held now.
        waiting: the requests that wait for one.
    """

    held: int
    waiting: int


class _Turn(TurnRequest):
    """A request for a turn.

    Attributes:
        gate: a lock that is released when the turn has come.
        granted: the turn has come.
    """

    __slots__ = ("gate", "granted")

    def __init__(self, cost_bytes: int) -> None:
        super().__init__(cost_bytes)
        self.gate = threading.Lock()
        self.gate.acquire()
        self.granted = False


class _Tenant:
    """The sessions of one tenant, by kind."""

    __slots__ = ("__weakref__", "large", "small")

    def __init__(self, root: Rotation, weight: int) -> None:
        kinds = Rotation(QUANTUM_BYTES, root, weight)
        self.small = Rotation(QUANTUM_BYTES, kinds)
        self.large = Rotation(QUANTUM_BYTES, kinds)


class FairShare:
    """The turns of one engine. Thread-safe."""

    def __init__(self, weights: Mapping[str, int] | None = None, turns: int = _TURNS) -> None:
        """Share an engine among tenants.

        Args:
            weights: the weight of each tenant, a whole number from 1 on; 1 for tenants that are not named.
            turns: the turns at a time.
        """
        self._weights = dict(weights or {})
        self._turns = turns
        self._free = turns
        self._waiting = 0
        self._lock = threading.Lock()
        self._root = Rotation(QUANTUM_BYTES)
        self._tenants: weakref.WeakValueDictionary[str, _Tenant] = weakref.WeakValueDictionary()

    def flow(self, step_bytes: int, tenant: str = "") -> Flow:
        """Return the place of a session among all.

        Args:
            step_bytes: the bytes that a step reads and writes.
            tenant: the tenant of the session.
        """
        return Flow(self, self.tenant(tenant), step_bytes)

    def statistics(self) -> ShareStatistics:
        """Return the turns now, all of one moment."""
        with self._lock:
            return ShareStatistics(self._turns - self._free, self._waiting)

    def tenant(self, name: str) -> _Tenant:
        """Return what the sessions of a tenant have in common, as long as there are some."""
        with self._lock:
            if (tenant := self._tenants.get(name)) is None:
                tenant = self._tenants[name] = _Tenant(self._root, self._weights.get(name, 1))
            return tenant

    def acquired_at_once(self) -> bool:
        """Acquire a turn if one is free."""
        with self._lock:
            if free := self._free:
                self._free = free - 1
        return free > 0

    def acquire(self, queue: Queue, nbytes: int, state: EngineState, gradient: Gradient | None) -> None:
        """Wait for a turn that was not free; see `Flow.acquire`."""
        state.yield_buffers(gradient)
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = _Turn(nbytes + _TURN_BYTES)
            queue.push(turn)
            self._waiting += 1
        try:
            turn.gate.acquire()
        except BaseException:
            self._withdraw(queue, turn)
            raise

    def count(self, flow: Flow, seconds: float) -> None:
        """Count time that a session had the engine without a turn."""
        with self._lock:
            flow.seconds += seconds

    def _withdraw(self, queue: Queue, turn: _Turn) -> None:
        """Give up a wait that was interrupted, or the turn that has come meanwhile."""
        with self._lock:
            if turn.granted:
                self._pass_on()
            else:
                queue.withdraw(turn)
                self._waiting -= 1

    def _pass_on(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        turn = self._root.pop()
        assert isinstance(turn, _Turn)
        self._waiting -= 1
        turn.granted = True
        turn.gate.release()


class Flow:
    """The place of one session among all that share an engine. Thread-safe.

    Attributes:
        seconds: the time that the session has held turns.
        tenant: the tenant that it was given to; None before.
    """

    __slots__ = ("_is_small", "_queue", "_share", "_tenant", "seconds", "tenant")

    def __init__(self, share: FairShare, tenant: _Tenant, step_bytes: int) -> None:
        """Share with the other sessions of a tenant; see `FairShare.flow`."""
        self._share = share
        self._is_small = step_bytes <= QUANTUM_BYTES
        self.seconds = 0.0
        self.tenant: str | None = None
        self._join(tenant)

    def give_to(self, tenant: str) -> None:
        """Share with the sessions of another tenant from now on. Requests that wait keep their places."""
        self.tenant = tenant
        self._join(self._share.tenant(tenant))

    def acquire(self, nbytes: int, state: EngineState, gradient: Gradient | None = None) -> float:
        """Wait for a turn. Requests of one session are served in the order in which they came.

        Args:
            nbytes: the bytes that are read and written in this turn.
            state: the state whose engine it is; if the turn does not come at once, it gives back its buffers first.
                The holder of another turn may wait for them.
            gradient: the gradient that the state is about to use; None for none.

        Returns:
            The beginning of the turn, for `release`.
        """
        if not self._share.acquired_at_once():
            self._share.acquire(self._queue, nbytes, state, gradient)
        return perf_counter()

    def release(self, began: float) -> None:
        """Give a turn back."""
        share, seconds = self._share, perf_counter() - began
        with share._lock:
            self.seconds += seconds
            if share._waiting:
                share._pass_on()  # the next request in order has it
            else:
                share._free += 1

    def count(self, seconds: float) -> None:
        """Count time that the session had the engine without a turn: small steps of a compiled lane have none."""
        self._share.count(self, seconds)

    def _join(self, tenant: _Tenant) -> None:
        self._tenant = tenant  # which lasts as long as there is a session of it
        self._queue = Queue(tenant.small if self._is_small else tenant.large)


def parse_weights(text: str) -> dict[str, int]:
    """Return the weight of each tenant in a text such as `lab=3,shop=1`.

    Raises:
        InvalidRequestError: a tenant has two weights.
    """
    weights: dict[str, int] = {}
    for name, _, weight in (pair.partition("=") for pair in text.split(",") if pair):
        if name in weights:
            raise InvalidRequestError.of("tenant_weights", f"tenant {name!r} has two weights; give one")
        weights[name] = int(weight)
    return weights
