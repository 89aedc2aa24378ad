"""The client: a connection to one server or several, and the sessions made through it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2

from stepwire.arrays.error_feedback import check_feedback
from stepwire.arrays.groups import grouped
from stepwire.arrays.packing import Arrays
from stepwire.arrays.tensor_specs import described, tensor_specs
from stepwire.arrays.trees import Structure, flattened, structure_like
from stepwire.connection.errands import by_errands, each_by_errand, undelivered
from stepwire.connection.watch import watched
from stepwire.errors import InvalidRequestError
from stepwire.lifetimes.process import process_label
from stepwire.links.link import Load, SessionLink
from stepwire.links.observed import ObservedSteps
from stepwire.links.ownership import Ownership
from stepwire.links.server import LinkOptions, ServerLink
from stepwire.loggers import Logger, checked_logger
from stepwire.optimizers import Adam, Optimizer
from stepwire.optimizers.aggregation import Aggregation, aggregation_to_wire
from stepwire.optimizers.arguments import check_choice
from stepwire.optimizers.durability import Durability, DurabilityLevel, durability_to_wire
from stepwire.optimizers.gradient_treatment import (
    ClipFormula,
    GradientTreatment,
    LossScaling,
    MissingGradient,
    NonFinite,
    treatment_to_wire,
)
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.optimizers.schedules import Schedule
from stepwire.results import ServerInfo, SessionInfo
from stepwire.session import Session
from stepwire.session_state import ForkOptions
from stepwire.statistics import Statistics
from stepwire.steps.trace import StepTracing
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2
from stepwire.wire.dtypes import dtype_named, dtype_to_wire
from stepwire.wire.messages import PRECISIONS, duration_to_wire, optimizer_to_wire
from stepwire.wire.text import checked_text

__all__ = ["Client"]

StatePrecision = Literal["float32", "bfloat16", "int8"]
Telemetry = Literal["full", "gradient", "none"]
RowSemantics = Literal["torch_sparse", "row_counter", "skipped", "global", "row_wise"]
Worker = int | Literal["any"]
_LONGEST_LEASE_SECONDS = 1e11  # about what a Duration holds
_LEAST_INTERVAL, _LONGEST_INTERVAL = 0.1, 3600.0
_MOST_WORKERS = 1 << 32
_TELEMETRY = {
    "full": session_pb2.TELEMETRY_LEVEL_FULL,
    "gradient": session_pb2.TELEMETRY_LEVEL_GRADIENT,
    "none": session_pb2.TELEMETRY_LEVEL_NONE,
}


@by_errands(but=["sessions", "statistics"], lasting=["close"])
class Client:
    """A connection to one server, or to several. Thread-safe. A context manager; closes twice without complaint.

    With several targets, sessions are sharded over them: see `stepwire.connect`.
    """

    def __init__(self, server: ServerLink, tracing: StepTracing | None = None) -> None:
        """Use a link to the server, or to several, and perhaps trace steps; see `stepwire.connect`."""
        self._server, self._tracing = server, tracing
        self._ownerships: weakref.WeakSet[Ownership] = weakref.WeakSet()

    @property
    def target(self) -> str:
        """The target of the connection; several targets are joined by commas."""
        return ",".join(self._server.targets)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of all connections, in order; sessions are sharded over several."""
        return self._server.targets

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server, or all servers, for their properties.

        Of several servers, the features are those that all serve, and limits are the least. Devices are those of all,
        as `"host:port cuda:0"`.

        Raises:
            UnavailableError: a server cannot be reached.
        """
        return self._server.info(timeout)

    def create_session(
        self,
        parameters: Arrays,
        *,
        optimizer: Optimizer | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        schedule: Schedule | None = None,
        frozen: Sequence[str] = (),
        tables: Mapping[str, RowSemantics] | None = None,
        gradient_dtype: npt.DTypeLike = np.float32,
        error_feedback: bool = False,
        reply_dtype: npt.DTypeLike = np.float32,
        state_precision: StatePrecision = "float32",
        tensor_precision: Mapping[str, StatePrecision] | None = None,
        non_finite: NonFinite | None = None,
        clip_grad_norm: float | None = None,
        clip_formula: ClipFormula | None = None,
        clip_grad_value: float | None = None,
        accumulation_steps: int = 1,
        loss_scaling: LossScaling | None = None,
        missing_gradient: MissingGradient = "reject",
        parameter_average_decay: float | None = None,
        telemetry: Telemetry = "full",
        durability: Durability | DurabilityLevel = "memory",
        aggregation: Aggregation | None = None,
        worker: Worker = 0,
        lease_seconds: float | None = None,
        device: str = "",
        label: str = "",
        keep: bool = False,
        request_id: str | None = None,
        logger: Logger | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an optimizer on the server and load the parameters into it.

        Args:
            parameters: float32, bfloat16 or float16 arrays; masters are float32 on the server. They come in a dict, in
                a list with the names "0", "1", …, or in a tree of dicts, lists and tuples. The names in a tree are
                paths such as "encoder/0/w". `stepwire.Table` in the places of all arrays leaves them to the server.
            optimizer: default `Adam()`.
            groups: mappings, as torch has them. `"params"` names the group's tensors, or branches of them. The other
                keys are the group's own hyper-parameters, its `"schedule"`, its `"clip_grad_norm"` and its
                `"state_precision"`. Tensors in no group form one more, first, with the optimizer's values.
            schedule: of the learning rate, evaluated on the server, for all groups that have none of their own.
            frozen: names of tensors, or of branches, that the server keeps and never steps.
            tables: the meaning of a step for rows, by the names of tensors whose gradients are `Rows`:
                `"torch_sparse"`, `"row_counter"`, `"skipped"`, `"global"`, or with Adagrad `"row_wise"`. See
                `docs/embeddings.md`.
            gradient_dtype: the encoding of gradients on the wire: `"float32"`, `"bfloat16"`, `"float16"`, or `"int8"`:
                blocks of 256 with a common factor, a quarter of the bytes.
            error_feedback: with `"int8"`, keep the encoding error of a gradient on the client, and add it to the next;
                eight bytes a parameter.
            reply_dtype: the encoding of parameters on the wire, and their dtype.
            state_precision: the precision of the optimizer's moments on the server; parameters are always float32. With
                `"bfloat16"` equal moments round alike, and AMSGrad takes steps that are up to a few percent too small.
                With `"int8"`, 256 neighbours share a maximum: beside a second moment a million times larger, one has no
                digits left, and its updates become too small. Keep embeddings, tensors with outliers and tensors whose
                gradients are mostly zero in `"float32"` or `"bfloat16"`, by their group or by `tensor_precision`.
            tensor_precision: the precision of the moments of some tensors, by the names of tensors or of branches, in
                place of their group's or the session's.
            non_finite: the policy for NaN and Inf in a gradient. `"reject"`, the default, refuses the step. `"skip"`,
                the default with loss scaling, uses up its number without an update. `"allow"` applies it.
            clip_grad_norm: bound of the gradient's global norm.
            clip_formula: the formula of clipping by norm: `"torch"` (the default), `"optax"` or `"keras"`.
            clip_grad_value: bound of each gradient element's magnitude.
            accumulation_steps: gradients summed into one update. A sum with NaN or Inf is refused, skipped or applied
                as `non_finite` says of one gradient.
            loss_scaling: dynamic loss scaling by the server; see `Session.loss_scale`.
            missing_gradient: `"keep"`: a step may leave tensors out, which stay as they are; `"reject"`: no step may.
            parameter_average_decay: decay of an exponential moving average of the parameters; see `Session.pull`. In
                float32 the average stays within 6e-8 / (1 − decay) of a parameter, and hardly moves from 0.99999 on.
            telemetry: the measurements in each result: `"full"`, the `"gradient"`'s norms only, or `"none"`. With
                `"none"` norms are 0, and the pass that computes them is left out. Clipping by norm and any `non_finite`
                but "allow" need that pass all the same.
            durability: the steps that survive a loss of the server: `"memory"`, `"checkpoint"` or `"journal"`, or a
                `Durability` with the times of its checkpoints. All but the first need a server with `--data-dir`.
            aggregation: the way that the gradients of several workers meet; None for one worker.
            worker: with aggregation, the index of the worker that this client steps as, or `"any"`. Every worker may
                create the session, with the same `request_id`: the first creates it, the others find it.
            lease_seconds: the life of the session without use; default the server's longest.
            device: the device of the state, by a name of `ServerInfo.devices` such as `"cuda:0"`; empty: the server's
                choice, the device with the most free budget.
            label: text for listings; default the host, the process id and the script, without a `request_id`.
            keep: the session stays on the server, until its lease runs out, when this process ends normally or drops
                its object without closing it. By default the session ends then, unless it has several workers; see
                `Session.keep`.
            request_id: makes a creation repeatable by another process, and keeps the session; default random.
            logger: a function of the step and its scalars, called after each step; see `stepwire.loggers`.
            timeout: seconds for all of it.

        Raises:
            InvalidRequestError: an argument is wrong; the message names it.
            UnsupportedFeatureError: the server does not serve an option, or does not have the device.
            ResourceExhaustedError: no memory, or too many sessions.
            UnavailableError: the server cannot be reached.
        """
        tree, logger = flattened(parameters, "parameters"), checked_logger(logger)
        named, semantics, made = described(tree.named, tables or {})
        membership, messages = grouped(named, groups or [], optimizer := optimizer or Adam(), schedule)
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
        check_choice("state_precision", state_precision, PRECISIONS)
        check_choice("telemetry", telemetry, _TELEMETRY)
        sent = dtype_named(gradient_dtype, "gradient_dtype", gradients=True)
        config = session_pb2.SessionConfig(
            tensors=tensor_specs(named, membership, frozen, tensor_precision or {}, semantics),
            groups=messages,
            optimizer=optimizer_to_wire(optimizer),
            gradient=treatment_to_wire(treatment),
            initialization=session_pb2.INITIALIZATION_ZEROS if made else None,
            state_precision=PRECISIONS[state_precision],
            telemetry=_TELEMETRY[telemetry],
            gradient_dtype=dtype_to_wire(sent),
            reply_dtype=dtype_to_wire(dtype_named(reply_dtype, "reply_dtype")),
            aggregation=None if aggregation is None else aggregation_to_wire(aggregation),
            lease=_lease(lease_seconds),
            device=checked_text(device, "device"),
            label=checked_text(label, "label") or ("" if request_id is not None else process_label()),
        )
        durability_to_wire(Durability.of(durability, "durability"), config)
        check_feedback(sent, error_feedback, semantics)
        link = self._server.create(config, _request_id(request_id), timeout, _options(worker, error_feedback, config))
        if request_id is None:  # nobody else knows the session, so nobody would end it
            undelivered(link.close)
        self._initialize(link, {} if made else tree.named, timeout)
        keep = keep or request_id is not None or aggregation is not None
        return self._owned(link, tree.structure, kept=keep, logger=logger)

    def session(
        self,
        session_id: str | Sequence[str],
        *,
        like: Arrays | None = None,
        worker: Worker = 0,
        error_feedback: bool = False,
        logger: Logger | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Return a session that exists; its first step or load acquires the worker and fences the former holder.

        Args:
            session_id: the session's id; with shards `Session.session_id`, or the ids in it. The servers of a sharded
                session must be those of its creation, in the same order.
            like: parameters, or anything else that nests as they do: the structure for `Session.pull` and for the
                shared arrays. Without it they are a flat dict of names: a server knows names, and no structure.
            worker: as for `create_session`.
            error_feedback: as for `create_session`; starts with nothing kept.
            logger: as for `create_session`.
            timeout: seconds.

        Raises:
            InvalidRequestError: `like` is no container of arrays, or these are not the shards of one model.
            SessionNotFoundError: there is no such session.
            UnavailableError: the server cannot be reached.
        """
        structure = structure_like(like)
        ids = [session_id] if isinstance(session_id, str) or not isinstance(session_id, Sequence) else session_id
        joined = ",".join(checked_text(each, "session_id") for each in ids)
        link = self._server.find(joined, timeout, _options(worker, error_feedback))
        return Session(link, structure, fork=self._forked, observed=self._observed(link, logger))

    def sessions(self, *, timeout: float | None = None) -> Iterator[SessionInfo]:
        """Yield the server's sessions, ordered by id; several servers one after another, shards singly.

        Raises:
            UnavailableError: the server cannot be reached.
        """
        return each_by_errand(self._server.sessions(timeout))

    def statistics(self, *, interval: float = 1.0, timeout: float | None = None) -> Iterator[Statistics]:
        """Yield a snapshot of the server and of its sessions in memory at once, and one per interval, for ever.

        Args:
            interval: the time between two snapshots in seconds, in [0.1, 3600].
            timeout: the longest wait for a snapshot beyond the interval, in seconds.

        Raises:
            InvalidRequestError: the interval is out of range.
            ResourceExhaustedError: as many callers watch the server as may.
            UnavailableError: the server cannot be reached, or has ended.
        """
        seconds = number(interval, "interval")
        if not _LEAST_INTERVAL <= seconds <= _LONGEST_INTERVAL:
            raise InvalidRequestError.of(
                "interval", f"{interval!r:.80} is not in [{_LEAST_INTERVAL}, {_LONGEST_INTERVAL}]"
            )
        return watched(self._server.statistics(seconds, timeout))

    def close(self) -> None:
        """Close the connection, and end the sessions made through it, unless they are kept: see `Session.keep`."""
        for ownership in list(self._ownerships):
            ownership.end()
        self._server.close()
        if self._tracing is not None:
            self._tracing.close()

    def __enter__(self) -> Client:
        """Use the client for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _forked(self, session_id: str, structure: Structure, options: ForkOptions) -> Session:
        """Make a fork; see `Session.fork`."""
        request = pb.ForkSessionRequest(
            request_id=_request_id(options.request_id) or "",
            label=None if options.label is None else checked_text(options.label, "label"),
            device=None if options.device is None else checked_text(options.device, "device"),
            lease=_lease(options.lease_seconds),
        )
        options.origin.fill(request)
        if options.durability is not None:
            own = session_pb2.SessionConfig()
            durability_to_wire(Durability.of(options.durability, "durability"), own)
            request.durability = own.durability
            if own.HasField("checkpoints"):
                request.checkpoints.CopyFrom(own.checkpoints)
        link = self._server.fork(session_id, request, options.timeout, error_feedback=options.error_feedback)
        if options.request_id is None:  # as in `create_session`
            undelivered(link.close)
        return self._owned(link, structure, kept=options.keep or options.request_id is not None)

    def _owned(self, link: SessionLink, structure: Structure, *, kept: bool, logger: Logger | None = None) -> Session:
        """Return a session that ends with its object, unless it is kept."""
        ownership = Ownership(link, kept=kept)
        self._ownerships.add(ownership)
        return Session(link, structure, ownership, self._forked, self._observed(link, logger))

    def _observed(self, link: SessionLink, logger: Logger | None = None) -> ObservedSteps:
        return ObservedSteps(link, logger, None if self._tracing is None else self._tracing.of_session())

    def _initialize(self, link: SessionLink, named: Mapping[str, Any], timeout: float | None) -> None:
        """Load the parameters of a new session, if any, unless it has some from an earlier request."""
        if not named:
            return
        parameters = Load({"param": link.description.packer.ordered(named, "parameters")})
        with link.lock:
            link.initialize(parameters, link.deadline(timeout))


def _options(worker: Worker, error_feedback: bool, config: session_pb2.SessionConfig | None = None) -> LinkOptions:
    """Return the options of a link to a session, of a config if that is known.

    Raises:
        InvalidRequestError: the worker is no index.
    """
    if worker == "any":
        return LinkOptions(error_feedback, None)
    index = whole_number(worker, "worker")
    workers = _MOST_WORKERS if config is None else config.aggregation.workers or 1
    if not 0 <= index < workers:
        known = f"the session has the workers 0 to {workers - 1}, and {index} is none of them"
        raise InvalidRequestError.of("worker", f"{index} is not in [0, {workers})" if config is None else known)
    return LinkOptions(error_feedback, index)


def _request_id(request_id: str | None) -> str | None:
    return None if request_id is None else checked_text(request_id, "request_id")


def _lease(seconds: float | None) -> duration_pb2.Duration | None:
    """Return a lease as the contract has it; None for the server's longest.

    Raises:
        InvalidRequestError: the lease is not a positive number.
    """
    if seconds is None:
        return None
    plain = number(seconds, "lease_seconds")
    if not 0 < plain < _LONGEST_LEASE_SECONDS:
        raise InvalidRequestError.of("lease_seconds", f"{seconds!r:.80} is not a positive number of seconds")
    return duration_to_wire(plain)
