"""The way between one client and its server, found by trying from the best to the last.

A connection is tried by a question for the instance id: only the server that named the Unix socket has it. The reason
for a failure is kept with its remedy, and the next transport is tried. TCP always works, or nothing does.
"""

from __future__ import annotations

import logging
import threading
from typing import Final, NamedTuple

from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.errors import StepwireError, UnavailableError, UnsupportedFeatureError
from stepwire.results import TransportChoice
from stepwire.transports.available import MEMORIES, TRANSPORTS, memory_problem, socket_problem
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.addresses import unix_path, unix_target

__all__ = ["Route", "Router", "Way"]

_log = logging.getLogger("stepwire")

_TEST_SECONDS: Final = 5.0
_LEAST_SECONDS: Final = 1e-3


class Way(NamedTuple):
    """The way that was found.

    Attributes:
        calls: the calls over the connection that carries streams, pulls and loads.
        name: the name of that connection: "uds" or "tcp".
        memories: the memories that may work, in the order in which a stream tries them.
        reasons: for each better transport that cannot be had, the reason against it, and the remedy.
    """

    calls: Calls
    name: str
    memories: tuple[str, ...]
    reasons: dict[str, str]


class Router:
    """Finds ways for the sessions of one client. Thread-safe. Closes twice without complaint.

    Attributes:
        asked: the transport for all sessions that ask for none of their own.
        calls: the calls over the connection that the user named.
    """

    def __init__(self, calls: Calls, asked: str) -> None:
        """Start from the connection that the user named.

        Args:
            calls: the calls over it; they stay the caller's.
            asked: the transport for all sessions that ask for none of their own.
        """
        self.asked = asked
        self.calls = calls
        self._lock = threading.Lock()
        self._by_path: dict[str, Calls] = {}

    def find(self, asked: str, deadline: Deadline) -> Way:
        """Find the best way.

        Args:
            asked: "auto", or the only transport that will do.
            deadline: the deadline of everything.

        Raises:
            UnsupportedFeatureError: the transport that was asked for cannot be had; the message says why.
            UnavailableError: the server cannot be reached at all.
        """
        on_socket = unix_path(self.calls.target) is not None
        if asked == "tcp":
            if on_socket:
                raise _cannot("tcp", f"the target {self.calls.target} has no port")
            return Way(self.calls, "tcp", (), dict.fromkeys(TRANSPORTS[:-1], "transport 'tcp' was asked for"))
        if asked == "uds" and on_socket:
            return Way(self.calls, "uds", (), dict.fromkeys(MEMORIES, "transport 'uds' was asked for"))
        info = self._ask(deadline)
        calls, reasons = (self.calls, {}) if on_socket else self._connection(info, deadline)
        if asked == "uds" and reasons:
            raise _cannot("uds", reasons["uds"])
        memories = []
        for name in MEMORIES:
            if problem := _unasked(name, asked) or memory_problem(name, info.local, named=name == asked):
                if name == asked:
                    raise _cannot(name, problem)
                reasons[name] = problem
            else:
                memories.append(name)
        return Way(calls, "tcp" if "uds" in reasons else "uds", tuple(memories), reasons)

    def close(self) -> None:
        """Close the connections that were opened here."""
        with self._lock:
            for calls in self._by_path.values():
                calls.close()
            self._by_path.clear()

    def _ask(self, deadline: Deadline) -> pb.GetServerInfoResponse:
        try:
            return _info(self.calls, deadline)
        except UnavailableError:
            raise
        except StepwireError:  # a server without this call offers nothing beyond its target
            return pb.GetServerInfoResponse()

    def _connection(self, info: pb.GetServerInfoResponse, deadline: Deadline) -> tuple[Calls, dict[str, str]]:
        """Return calls over the server's Unix socket if that works, else over TCP, and the reason."""
        if problem := socket_problem(info.local):
            return self.calls, {"uds": problem}
        calls = self._over(info.local.unix_socket)
        try:
            other = _info(calls, max(min(_TEST_SECONDS, deadline.remaining()), _LEAST_SECONDS))
        except StepwireError as failed:
            return self.calls, {"uds": f"the server does not answer on its socket {info.local.unix_socket}: {failed}"}
        if not info.instance_id or other.instance_id != info.instance_id:
            return self.calls, {"uds": f"another server answers on the socket {info.local.unix_socket}"}
        return calls, {}

    def _over(self, path: str) -> Calls:
        with self._lock:
            if path not in self._by_path:
                self._by_path[path] = Calls(
                    unix_target(path),
                    timeout_seconds=self.calls.timeout_seconds,
                    retry=self.calls.retry,
                    security=self.calls.security,
                )
            return self._by_path[path]


class Route:
    """The way of one session. Thread-safe: a pull needs no turn, and may lose the way while a stream is opened on it.

    Attributes:
        asked: "auto", or the only transport that will do.
        choice: the transport of the attached stream, and the reasons against better ones; None before the first.
    """

    def __init__(self, router: Router, session_id: str, asked: str | None = None) -> None:
        """Find a way when it is first needed; `asked` None means the client's."""
        self.asked = router.asked if asked is None else asked
        self.choice: TransportChoice | None = None
        self._router = router
        self._session_id = session_id
        self._way: Way | None = None
        self._lock = threading.Lock()

    @property
    def calls(self) -> Calls:
        """Calls over the connection that the user named."""
        return self._router.calls

    def way(self, deadline: Deadline) -> Way:
        """Return the way, finding it if there is none.

        Raises:
            StepwireError: as `Router.find`.
        """
        with self._lock:
            way, asked = self._way, self.asked
        if way is None:
            way = self._router.find(asked, deadline)
            with self._lock:
                if asked == self.asked:
                    self._way = way
        return way

    def ask(self, transport: str) -> None:
        """Ask for another transport from now on."""
        with self._lock:
            self.asked, self._way = transport, None

    def lost(self) -> None:
        """Forget the way, because its connection broke: perhaps its socket is gone, and another server on the port."""
        self._way = None

    def refuse(self, way: Way, name: str, reason: str) -> None:
        """Note that a memory of a way was tried and cannot be had.

        Raises:
            UnsupportedFeatureError: the user asked for this memory.
        """
        if name == self.asked:
            raise _cannot(name, reason)
        way.reasons[name] = reason

    def no_shared_memory(self) -> UnsupportedFeatureError:
        """Return the error of a call that needs memory shared with the server, where the stream shares none."""
        reason = ""
        if self.choice is not None:
            reason = self.choice.reasons.get("shm", f"it uses {self.choice.name!r}")
        return UnsupportedFeatureError(
            f"the session shares no memory with its server: {reason}; pass arrays of your own to `step`",
            metadata={"field": "transport", "feature": "transport_shm"},
        )

    def settle(self, way: Way, memory: str = "", bare: str = "") -> None:
        """Note the transport of the attached stream: a memory of its way, or the connection alone.

        Args:
            way: the way of the stream.
            memory: one of its memories; empty for the connection alone.
            bare: the reason for a packet lane without shared memory; empty if there is memory, or no lane.
        """
        name = memory or way.name
        better = TRANSPORTS[: TRANSPORTS.index(name)]
        reasons = {other: way.reasons[other] for other in better if other in way.reasons}
        choice = TransportChoice(name, reasons | ({"shm": bare} if bare else {}))
        if choice != self.choice:
            self.choice = choice
            _log.info("session %s: %s", self._session_id, choice)


def _info(calls: Calls, timeout: float | Deadline) -> pb.GetServerInfoResponse:
    request = pb.GetServerInfoRequest()
    response: pb.GetServerInfoResponse = calls.unary("GetServerInfo", request, pb.GetServerInfoResponse, timeout)
    return response


def _unasked(name: str, asked: str) -> str:
    return "" if asked in ("auto", name) else f"transport {asked!r} was asked for"


def _cannot(name: str, reason: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"transport: {name!r} cannot be had: {reason}; or leave the choice to transport='auto'",
        metadata={"field": "transport", "feature": f"transport_{name}", "problem": reason},
    )
