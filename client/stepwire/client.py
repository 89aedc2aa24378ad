"""The client: a connection to one server, and the sessions made through it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stepwire.calls import Calls
from stepwire.codecs import dtype_named, dtype_to_wire
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.layout import TensorSpec
from stepwire.optimizers import Adam
from stepwire.packing import Arrays, named_arrays
from stepwire.results import ServerInfo, SessionInfo
from stepwire.retry import Retry
from stepwire.session import Session
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN
from stepwire.wire import optimizer_to_wire, overrides_to_wire, spec_to_wire

__all__ = ["Client", "connect"]

NonFinite = Literal["reject", "skip", "allow"]
_POLICIES = {
    "reject": optimizer_pb2.NON_FINITE_POLICY_REJECT,
    "skip": optimizer_pb2.NON_FINITE_POLICY_SKIP,
    "allow": optimizer_pb2.NON_FINITE_POLICY_ALLOW,
}
_PREFERRED_CHUNK_BYTES = 4 << 20


def connect(target: str = "localhost:50051", *, timeout: float = 60.0, retry: Retry | None = None) -> Client:
    """Open a client; it connects with its first call.

    Args:
        target: `host:port`.
        timeout: default seconds of a call with all its repetitions.
        retry: how to pause between repetitions; tests pass their own clock.

    Raises:
        InvalidRequestError: the timeout is not positive.
    """
    return Client(Calls(target, timeout_seconds=timeout, retry=retry or Retry()))


class Client:
    """A connection to one server. Thread-safe. A context manager; closes twice without complaint."""

    def __init__(self, calls: Calls) -> None:
        """Use an open channel; see `connect`."""
        self._calls = calls
        self._info: ServerInfo | None = None

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server what it is and can do.

        Raises:
            UnavailableError: it cannot be reached.
        """
        answer = self._calls.unary("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, timeout)
        return ServerInfo.from_wire(answer)

    def create_session(
        self,
        parameters: Arrays,
        *,
        optimizer: Adam | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        gradient_dtype: npt.DTypeLike = np.float32,
        reply_dtype: npt.DTypeLike = np.float32,
        non_finite: NonFinite = "reject",
        lease_seconds: float | None = None,
        label: str = "",
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an optimizer on the server and load the parameters into it.

        Args:
            parameters: a dict, or a list whose names are "0", "1", …; float32, bfloat16 or float16. Masters are
                float32 on the server.
            optimizer: default `Adam()`.
            groups: as torch's: mappings with `"params"`, the names of a group's tensors, and the hyper-parameters it
                has of its own. Tensors in no group form one more, first, with the optimizer's values.
            gradient_dtype: how gradients travel.
            reply_dtype: how parameters come back, and their dtype.
            non_finite: what to do with NaN and Inf in a gradient: refuse the step, use up its number without an
                update, or apply it.
            lease_seconds: how long the session lives unused; default the server's longest.
            label: text for listings.
            request_id: makes a creation repeatable by another process; default random.
            timeout: seconds for all of it.

        Raises:
            InvalidRequestError: an argument is wrong; the message names it.
            UnsupportedFeatureError: the server does not serve an option.
            ResourceExhaustedError: no memory, or too many sessions.
            UnavailableError: the server cannot be reached.
        """
        named = named_arrays(parameters, "parameters")
        optimizer = optimizer or Adam()
        membership, overrides = _grouped(named, groups or [], optimizer)
        if non_finite not in _POLICIES:
            raise _invalid("non_finite", f"{non_finite!r}; use one of {', '.join(_POLICIES)}")
        if lease_seconds is not None and not lease_seconds > 0:
            raise _invalid("lease_seconds", f"{lease_seconds!r} is not a positive number of seconds")
        config = session_pb2.SessionConfig(
            tensors=[spec_to_wire(TensorSpec(name, array.shape, membership[name])) for name, array in named.items()],
            groups=overrides,
            optimizer=optimizer_to_wire(optimizer),
            gradient=optimizer_pb2.GradientTreatment(non_finite=_POLICIES[non_finite]),
            gradient_dtype=dtype_to_wire(dtype_named(gradient_dtype, "gradient_dtype")),
            reply_dtype=dtype_to_wire(dtype_named(reply_dtype, "reply_dtype")),
            lease_seconds=lease_seconds or 0.0,
            label=label,
        )
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.CreateSessionRequest(request_id=request_id or secrets.token_hex(16), config=config)
        answer = self._calls.unary("CreateSession", request, pb.CreateSessionResponse, timeout)
        session = Session(
            self._calls,
            answer.session,
            # Where the request came before, perhaps from another process, the first step takes the slot anew: two
            # holders of one token would take each other's steps for their own.
            0 if answer.replayed else answer.attach_token,
            chunk_bytes,
            as_list=not isinstance(parameters, Mapping),
        )
        if not answer.session.ready:
            try:
                session.load(parameters, timeout=timeout)
            except BaseException:
                if request_id is None:  # nobody else knows the session, so nobody would end it
                    session.close()
                raise
        return session

    def session(self, session_id: str, *, timeout: float | None = None) -> Session:
        """Return a session that exists; its first step or load takes the slot and fences who held it.

        Raises:
            SessionNotFoundError: it does not exist.
            UnavailableError: the server cannot be reached.
        """
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.GetSessionRequest(session_id=session_id)
        answer = self._calls.unary("GetSession", request, pb.GetSessionResponse, timeout)
        return Session(self._calls, answer.session, 0, chunk_bytes, as_list=False)

    def sessions(self, *, timeout: float | None = None) -> Iterator[SessionInfo]:
        """Yield the server's sessions, ordered by id.

        Raises:
            UnavailableError: the server cannot be reached.
        """
        token = ""
        while True:
            request = pb.ListSessionsRequest(page_token=token)
            page = self._calls.unary("ListSessions", request, pb.ListSessionsResponse, timeout)
            yield from map(SessionInfo.from_wire, page.sessions)
            if not (token := page.next_page_token):
                return

    def close(self) -> None:
        """Close the connection; sessions stay on the server until their leases run out."""
        self._calls.close()

    def __enter__(self) -> Client:
        """Use the client for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _chunk_bytes(self, timeout: float | None) -> int:
        """Return the size of our chunks, after checking once that the server speaks our protocol."""
        if self._info is None:
            info = self.info(timeout=timeout)
            if info.protocol_min > PROTOCOL_MAX or info.protocol_max < PROTOCOL_MIN:
                raise UnsupportedFeatureError(
                    f"the server {info.version} speaks protocol {info.protocol_min} to {info.protocol_max}, this "
                    f"client {PROTOCOL_MIN} to {PROTOCOL_MAX}; bring the older of the two up to date",
                    metadata={"field": "protocol", "feature": "protocol"},
                )
            self._info = info
        return min(_PREFERRED_CHUNK_BYTES, self._info.max_chunk_bytes)


def _grouped(
    named: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], optimizer: Adam
) -> tuple[dict[str, int], list[optimizer_pb2.ParameterGroup]]:
    """Return each tensor's group index and the groups' messages."""
    base = optimizer.hyperparameters()
    membership: dict[str, int] = {}
    listed = {name for group in groups for name in group.get("params", ())}
    first = 0 if groups and listed >= set(named) else 1
    messages = [optimizer_pb2.ParameterGroup() for _ in range(first)]
    for index, group in enumerate(groups):
        field = f"groups[{index}]"
        overrides = {name: value for name, value in group.items() if name != "params"}
        if "params" not in group:
            raise _invalid(f"{field}.params", "is missing; name the group's tensors")
        for name in group["params"]:
            if name not in named or name in membership:
                problem = "is in two groups" if name in membership else "is not a parameter"
                raise _invalid(f"{field}.params", f"{name!r} {problem}")
            membership[name] = first + index
        messages.append(optimizer_pb2.ParameterGroup(overrides=overrides_to_wire(base, overrides, field)))
    return {name: membership.get(name, 0) for name in named}, messages


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", metadata={"field": field})
