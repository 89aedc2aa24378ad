"""The client: a connection to one server, and the sessions made through it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import check_feedback
from stepwire.arrays.groups import grouped
from stepwire.arrays.packing import Arrays, named_arrays
from stepwire.arrays.trees import Flattened, Structure, expanded, flattened, structure_like
from stepwire.connection.channel import Calls
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.layout import TensorSpec
from stepwire.optimizers import Adam, Optimizer
from stepwire.optimizers.gradient_treatment import (
    ClipFormula,
    GradientTreatment,
    LossScaling,
    MissingGradient,
    NonFinite,
    treatment_to_wire,
)
from stepwire.optimizers.schedules import Schedule
from stepwire.results import PRECISIONS, ServerInfo, SessionInfo
from stepwire.session import Session
from stepwire.transports.route import Router
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN
from stepwire.wire.dtypes import dtype_named, dtype_to_wire
from stepwire.wire.messages import duration_to_wire, optimizer_to_wire, spec_to_wire

__all__ = ["Client"]

_S = TypeVar("_S", bound=Session)
StatePrecision = Literal["float32", "bfloat16", "int8"]
Telemetry = Literal["full", "gradient", "none"]
_LONGEST_LEASE_SECONDS = 1e11  # about what a Duration holds
_TELEMETRY = {
    "full": session_pb2.TELEMETRY_LEVEL_FULL,
    "gradient": session_pb2.TELEMETRY_LEVEL_GRADIENT,
    "none": session_pb2.TELEMETRY_LEVEL_NONE,
}


class Client:
    """A connection to one server. Thread-safe. A context manager; closes twice without complaint."""

    def __init__(self, calls: Calls, transport: str = "auto") -> None:
        """Use an open channel; see `stepwire.connect`."""
        self._calls = calls
        self._router = Router(calls, transport)
        self._info: ServerInfo | None = None

    @property
    def target(self) -> str:
        """Where it connects to."""
        return self._calls.target

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
        optimizer: Optimizer | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        schedule: Schedule | None = None,
        frozen: Sequence[str] = (),
        gradient_dtype: npt.DTypeLike = np.float32,
        error_feedback: bool = False,
        reply_dtype: npt.DTypeLike = np.float32,
        state_precision: StatePrecision = "float32",
        non_finite: NonFinite | None = None,
        clip_grad_norm: float | None = None,
        clip_formula: ClipFormula | None = None,
        clip_grad_value: float | None = None,
        accumulation_steps: int = 1,
        loss_scaling: LossScaling | None = None,
        missing_gradient: MissingGradient = "reject",
        parameter_average_decay: float | None = None,
        telemetry: Telemetry = "full",
        lease_seconds: float | None = None,
        device: str = "",
        label: str = "",
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an optimizer on the server and load the parameters into it.

        Args:
            parameters: a dict, or a list whose names are "0", "1", …, or a tree of dicts, lists and tuples, whose
                names are paths such as "encoder/0/w"; float32, bfloat16 or float16. Masters are float32 on the server.
            optimizer: default `Adam()`.
            groups: as torch's: mappings with `"params"`, the names of a group's tensors, or of branches that stand for
                all tensors in them, the hyper-parameters it has of its own, and, where wanted, its own `"schedule"` and
                `"clip_grad_norm"`. Tensors in no group form one more, first, with the optimizer's values.
            schedule: of the learning rate, evaluated on the server, for all groups that have none of their own.
            frozen: names of tensors, or of branches, that are held and never stepped.
            gradient_dtype: how gradients travel: `"float32"`, `"bfloat16"`, `"float16"`, or `"int8"`: blocks of 256
                with a common factor, a quarter of the bytes.
            error_feedback: with `"int8"`, keep on the client what the encoding took off a gradient, and add it to the
                next; eight bytes a parameter.
            reply_dtype: how parameters come back, and their dtype.
            state_precision: how the server holds the optimizer's moments; parameters are always float32.
            non_finite: what to do with NaN and Inf in a gradient: `"reject"` the step (the default), `"skip"`: use up
                its number without an update (the default with loss scaling), or `"allow"`: apply it.
            clip_grad_norm: bound of the gradient's global norm.
            clip_formula: whose form of clipping by norm: `"torch"` (the default), `"optax"` or `"keras"`.
            clip_grad_value: bound of each gradient element's magnitude.
            accumulation_steps: gradients summed into one update.
            loss_scaling: dynamic loss scaling by the server; see `Session.loss_scale`.
            missing_gradient: `"keep"`: a step may leave tensors out, which stay as they are; `"reject"`: it may not.
            parameter_average_decay: decay of an exponential moving average of the parameters; see `Session.pull`.
            telemetry: what each result tells: `"full"`, the `"gradient"`'s norms only, or `"none"`: where nothing else
                needs the gradient's norm (as clipping by norm and any `non_finite` but "allow" do), the pass that
                computes it is left out, and norms are 0.
            lease_seconds: how long the session lives unused; default the server's longest.
            device: where the state lives, by a name of `ServerInfo.devices` such as `"cuda:0"`; empty: the server's
                choice, the device with the most free budget.
            label: text for listings.
            request_id: makes a creation repeatable by another process; default random.
            timeout: seconds for all of it.

        Raises:
            InvalidRequestError: an argument is wrong; the message names it.
            UnsupportedFeatureError: the server does not serve an option, or does not have the device.
            ResourceExhaustedError: no memory, or too many sessions.
            UnavailableError: the server cannot be reached.
        """
        tree = flattened(parameters, "parameters")
        named = named_arrays(tree.named, "parameters")
        optimizer = optimizer or Adam()
        membership, messages = grouped(named, groups or [], optimizer, schedule)
        treatment = GradientTreatment(
            non_finite=non_finite,
            clip_grad_norm=clip_grad_norm,
            clip_formula=clip_formula,
            clip_grad_value=clip_grad_value,
            accumulation_steps=accumulation_steps,
            loss_scaling=loss_scaling,
            missing_gradient=missing_gradient,
            parameter_average_decay=parameter_average_decay,
        )
        treatment.check("", group_clips=any(message.HasField("clip_grad_norm") for message in messages))
        for field, choice, allowed in (
            ("state_precision", state_precision, PRECISIONS),
            ("telemetry", telemetry, _TELEMETRY),
        ):
            if choice not in allowed:
                raise InvalidRequestError.of(field, f"{choice!r}; use one of: {', '.join(allowed)}")
        frozen = list(expanded(frozen, named))
        if unknown := [name for name in frozen if name not in named]:
            raise InvalidRequestError.of("frozen", f"{unknown[0]!r} is not a parameter")
        if lease_seconds is not None and not 0 < lease_seconds < _LONGEST_LEASE_SECONDS:
            raise InvalidRequestError.of("lease_seconds", f"{lease_seconds!r} is not a positive number of seconds")
        sent = dtype_named(gradient_dtype, "gradient_dtype", gradients=True)
        check_feedback(sent, error_feedback)
        config = session_pb2.SessionConfig(
            tensors=[
                spec_to_wire(TensorSpec(name, array.shape, membership[name], name in frozen))
                for name, array in named.items()
            ],
            groups=messages,
            optimizer=optimizer_to_wire(optimizer),
            gradient=treatment_to_wire(treatment),
            state_precision=PRECISIONS[state_precision],
            telemetry=_TELEMETRY[telemetry],
            gradient_dtype=dtype_to_wire(sent),
            reply_dtype=dtype_to_wire(dtype_named(reply_dtype, "reply_dtype")),
            lease=None if lease_seconds is None else duration_to_wire(lease_seconds),
            device=device,
            label=label,
        )
        return self._create(config, tree, request_id, timeout, error_feedback=error_feedback)

    def session(
        self,
        session_id: str,
        *,
        like: Arrays | None = None,
        error_feedback: bool = False,
        timeout: float | None = None,
    ) -> Session:
        """Return a session that exists; its first step or load takes the slot and fences who held it.

        Args:
            session_id: which.
            like: parameters, or anything else that nests as they do: how `Session.pull` and the shared arrays are to
                nest. Without, they are a flat dict of names: a server knows names, not what a client made them from.
            error_feedback: as for `create_session`; starts with nothing kept.
            timeout: seconds.

        Raises:
            InvalidRequestError: `like` is no container of arrays.
            SessionNotFoundError: it does not exist.
            UnavailableError: the server cannot be reached.
        """
        structure = structure_like(like)
        return self._find(Session, session_id, timeout, structure=structure, error_feedback=error_feedback)

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
        self._router.close()
        self._calls.close()

    def __enter__(self) -> Client:
        """Use the client for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # --- what both kinds of clients make sessions by -----------------------------------------------------

    def _make(
        self,
        kind: type[_S],
        config: session_pb2.SessionConfig,
        request_id: str | None,
        timeout: float | None,
        *,
        structure: Structure,
        error_feedback: bool,
    ) -> tuple[_S, bool]:
        """Create a session from its config, and load nothing; tell whether it has parameters all the same.

        Raises:
            StepwireError: as `create_session`.
        """
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.CreateSessionRequest(request_id=request_id or secrets.token_hex(16), config=config)
        answer = self._calls.unary("CreateSession", request, pb.CreateSessionResponse, timeout)
        # Where the request came before, perhaps from another process, the first step takes the slot anew: two
        # holders of one token would take each other's steps for their own.
        token = 0 if answer.replayed else answer.attach_token
        options: dict[str, Any] = {"structure": structure, "error_feedback": error_feedback}
        return kind(self._calls, self._router, answer.session, token, chunk_bytes, **options), answer.session.ready

    def _find(
        self, kind: type[_S], session_id: str, timeout: float | None, *, structure: Structure, error_feedback: bool
    ) -> _S:
        """Return a session that exists.

        Raises:
            StepwireError: as `session`.
        """
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.GetSessionRequest(session_id=session_id)
        answer = self._calls.unary("GetSession", request, pb.GetSessionResponse, timeout)
        options: dict[str, Any] = {"structure": structure, "error_feedback": error_feedback}
        return kind(self._calls, self._router, answer.session, 0, chunk_bytes, **options)

    def _create(
        self,
        config: session_pb2.SessionConfig,
        parameters: Flattened,
        request_id: str | None,
        timeout: float | None,
        *,
        error_feedback: bool,
    ) -> Session:
        """Create what `create_session` has checked, and load it."""
        session, ready = self._make(
            Session, config, request_id, timeout, structure=parameters.structure, error_feedback=error_feedback
        )
        if not ready:
            try:
                session.load(parameters.named, timeout=timeout)
            except BaseException:
                if request_id is None:  # nobody else knows the session, so nobody would end it
                    session.close()
                raise
        return session

    def _chunk_bytes(self, timeout: float | None) -> int:
        """Return the largest chunk that the server takes, after checking once that the server speaks our protocol."""
        if self._info is None:
            info = self.info(timeout=timeout)
            if info.protocol_min > PROTOCOL_MAX or info.protocol_max < PROTOCOL_MIN:
                raise UnsupportedFeatureError(
                    f"the server {info.version} speaks protocol {info.protocol_min} to {info.protocol_max}, this "
                    f"client {PROTOCOL_MIN} to {PROTOCOL_MAX}; bring the older of the two up to date",
                    metadata={"field": "protocol", "feature": "protocol"},
                )
            self._info = info
        return self._info.max_chunk_bytes
