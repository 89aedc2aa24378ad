"""The options of `stepwire.torch`'s optimizers besides torch's own arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stepwire.client import Client, RowSemantics, StatePrecision, Telemetry, Worker
from stepwire.connecting import connect
from stepwire.loggers import Logger
from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.durability import Durability, DurabilityLevel
from stepwire.optimizers.gradient_treatment import NonFinite

__all__ = ["RemoteOptions", "split_options"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """The server of an optimizer, and the options of its session.

    Attributes:
        server: `host:port`, `unix:/path`, several of them for a model partitioned over servers, or a `stepwire.Client`.
            By default the target that `stepwire.connect()` finds.
        session: the id of a session to resume instead of a new one. Its parameters are pulled into the model.
        transport: the transport, as for `stepwire.connect`.
        channels: the number of channels, as for `stepwire.connect`.
        timeout: the time limit of a step or another call with all its repetitions, in seconds.
        clip_grad_norm: the bound of the global gradient norm, as of `torch.nn.utils.clip_grad_norm_` before a step.
        clip_grad_value: the bound of each element, as of `torch.nn.utils.clip_grad_value_`.
        non_finite: the policy for NaN and Inf in a gradient. `"reject"` raises an error that names the first such
            tensor, and changes nothing. `"skip"` counts the step without an update. `"allow"` applies it, as torch
            does.
        gradient_dtype: the wire dtype of gradients; by default the parameters' dtype, or float32 if they have several.
        reply_dtype: the wire dtype of parameters in replies; the same default.
        error_feedback: error feedback with `gradient_dtype="int8"`, see `Client.create_session`.
        state_precision: the precision of moments on the server: `"float32"`, `"bfloat16"` or `"int8"`. AMSGrad with
            `"bfloat16"` takes steps that are up to a few percent too small. A parameter group may have its own, by the
            key `"state_precision"`. With `"int8"`, keep embeddings, tensors with outliers and tensors whose gradients
            are mostly zero in another precision; see `Client.create_session`.
        tensor_precision: the precision of the moments of some parameters, by the names of parameters or of modules, in
            place of their group's or the optimizer's: `{"embedding": "float32"}`. The names are those of
            `model.named_parameters()`, if the optimizer has these.
        tables: the names of parameters, or of modules, that are tables from the first session on: their gradients are
            sparse, and a step sends and gets their rows alone. Another parameter becomes a table with its first sparse
            gradient, and the state moves to another session once.
        row_semantics: the meaning of a step for the rows of sparse gradients: `"torch_sparse"`, `"global"`, or, for
            parameters that `tables` names, `"row_counter"` or `"skipped"`; see `docs/embeddings.md`. By default that
            of torch's optimizer of the same name: SGD and Adagrad have one, and the others refuse sparse gradients.
        telemetry: the content of `last_result`, as for `Client.create_session`. `"none"` with `non_finite="allow"`
            omits a pass over the gradient, which torch's optimizers do not make either.
        durability: the steps that survive a loss of the server, as for `Client.create_session`.
        window_bytes: the bytes of steps that are sent again after a loss, as for `stepwire.connect`.
        amp_scaling: True if the server unscales GradScaler's gradients. False if GradScaler unscales them on the
            client, with a pass over the gradients.
        shared_views: True to make parameters and `.grad` views of the memory that a server on this host shares, so that
            a step copies nothing. See `stepwire.torch`.
        send_in_backward: True to send each gradient as soon as the backward pass has made it. See `stepwire.torch`.
        light_state_dict: True for a `state_dict()` with the session's id instead of tensors.
        lease_seconds: the life of an unused session, in seconds; by default the server's longest.
        device: the server's name of the device of the state; by default the server's choice.
        label: a text for listings; by default the host, the process id and the script.
        worker: the index of this process among the workers of one model, or `"any"`; see `stepwire.Aggregation`.
        workers: the number of workers, each with a model and an optimizer like this. Each step is one step of the mean
            of their gradients, and all models get the same parameters.
        aggregation: another way for the gradients of several workers to meet, in the place of `workers`.
        job: the name by which the workers of one model find one another on the server.
        keep: True to leave the session on the server when the program ends, or drops the optimizer, without `close`. By
            default the session ends then, unless its id or a handle was read, or the optimizer was detached.
        logger: a function of the step and its scalars, called after each step; see `stepwire.loggers`.
    """

    server: str | Sequence[str] | Client | None = None
    session: str | None = None
    transport: str = "auto"
    channels: int = 1
    timeout: float = 60.0
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    non_finite: NonFinite = "reject"
    gradient_dtype: Any = None
    reply_dtype: Any = None
    error_feedback: bool = False
    state_precision: StatePrecision = "float32"
    tensor_precision: Mapping[str, StatePrecision] | None = None
    tables: Sequence[str] = ()
    row_semantics: RowSemantics | None = None
    telemetry: Telemetry = "full"
    durability: Durability | DurabilityLevel = "memory"
    window_bytes: int = 0
    amp_scaling: bool = True
    shared_views: bool = False
    send_in_backward: bool = False
    light_state_dict: bool = False
    lease_seconds: float | None = None
    device: str = ""
    label: str = ""
    worker: Worker | None = None
    workers: int | None = None
    aggregation: Aggregation | None = None
    job: str | None = None
    keep: bool = False
    logger: Logger | None = None

    def client(self) -> Client:
        """Return a client of the server: the user's own, or a new one.

        Raises:
            InvalidRequestError: the target or the transport does not exist.
        """
        if isinstance(self.server, Client):
            return self.server
        return connect(
            self.server,
            transport=self.transport,
            channels=self.channels,
            timeout=self.timeout,
            window_bytes=self.window_bytes,
        )

    @property
    def owns_client(self) -> bool:
        """True if the client closes with the optimizer."""
        return not isinstance(self.server, Client)


_NAMES = frozenset(field.name for field in dataclasses.fields(RemoteOptions))


def split_options(arguments: dict[str, Any]) -> tuple[RemoteOptions, dict[str, Any]]:
    """Return the options among keyword arguments, and torch's own arguments."""
    ours = {name: value for name, value in arguments.items() if name in _NAMES}
    return RemoteOptions(**ours), {name: value for name, value in arguments.items() if name not in _NAMES}
