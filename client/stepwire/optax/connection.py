"""The server of a transformation's session, and the options of the session."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

import numpy.typing as npt

from stepwire.client import Client, StatePrecision, Telemetry
from stepwire.connecting import connect, count_servers
from stepwire.connection.config_file import asked_target, read_config_file
from stepwire.errors import InvalidRequestError
from stepwire.optimizers.durability import Durability, DurabilityLevel
from stepwire.optimizers.gradient_treatment import ClipFormula, NonFinite

__all__ = ["Connection", "TransformationOptions"]


class TransformationOptions(TypedDict, total=False):
    """The keyword options of every constructor besides optax's own arguments.

    `server`, `transport`, `channels`, `timeout` and `window_bytes` are those of `stepwire.connect`. `server` may also
    be a `stepwire.Client`, which the caller closes. The other options are those of `Client.create_session`, with paths
    such as "encoder/0/w" as names of tensors. Three defaults differ. The default of `clip_formula` is "optax". That of
    `gradient_dtype` and `reply_dtype` is the parameters' dtype if all are bfloat16 or all float16, else float32.

    With `state_precision="int8"`, name embeddings, tensors with outliers and tensors whose gradients are mostly zero in
    `tensor_precision`, such as `{"embedding": "float32"}`. `Client.create_session` has the reason.

    JAX has its own way for other options: schedules are callables, as optax has them, and the program scales losses and
    masks gradients.
    """

    server: str | Sequence[str] | Client
    transport: str
    channels: int
    timeout: float
    groups: Sequence[Mapping[str, Any]]
    frozen: Sequence[str]
    gradient_dtype: npt.DTypeLike
    error_feedback: bool
    reply_dtype: npt.DTypeLike
    state_precision: StatePrecision
    tensor_precision: Mapping[str, StatePrecision]
    non_finite: NonFinite
    clip_grad_norm: float
    clip_formula: ClipFormula
    clip_grad_value: float
    accumulation_steps: int
    parameter_average_decay: float
    telemetry: Telemetry
    durability: Durability | DurabilityLevel
    window_bytes: int
    lease_seconds: float
    device: str
    label: str
    keep: bool


_CONNECTING: Final = ("transport", "channels", "timeout", "window_bytes")
_ID_BYTES: Final = 33  # of one session's id, and the comma that joins the ids of shards


@dataclasses.dataclass(frozen=True)
class Connection:
    """The servers of a transformation, and the options of the connection. Equal connections have one client.

    Attributes:
        server: the targets, or the user's client.
        options: the arguments of `stepwire.connect` besides the target.
    """

    server: tuple[str, ...] | Client
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> tuple[Connection, dict[str, Any]]:
        """Return the connection in a constructor's options, and the options of the session.

        Raises:
            InvalidRequestError: an option does not exist, or options contradict each other.
        """
        if unknown := sorted(set(options) - set(TransformationOptions.__annotations__)):
            allowed = ", ".join(TransformationOptions.__annotations__)
            raise InvalidRequestError.of(unknown[0], f"there is no such option; use one of: {allowed}")
        server = options.get("server") or asked_target(None, read_config_file())
        given = tuple((name, options[name]) for name in _CONNECTING if name in options)
        if isinstance(server, Client) and given:
            raise InvalidRequestError.of(
                given[0][0], "the client given as `server` is connected already; give the option to `connect`"
            )
        targets = server if isinstance(server, Client) else (server,) if isinstance(server, str) else tuple(server)
        rest = {name: value for name, value in options.items() if name not in ("server", *_CONNECTING)}
        return cls(targets, given), rest

    @property
    def owned(self) -> bool:
        """True if `open` makes the client, and stepwire closes it."""
        return not isinstance(self.server, Client)

    @property
    def id_bytes(self) -> int:
        """The largest length of a session's id in bytes, known in advance because JAX fixes shapes in a trace.

        Raises:
            UnavailableError: a target tells no shard yet; see `stepwire.connect`.
        """
        if isinstance(self.server, Client):
            return _ID_BYTES * (self.server.target.count(",") + 1)
        options = dict(self.options)
        servers = sum(count_servers(target, timeout=options.get("timeout", 60.0)) for target in self.server)
        return _ID_BYTES * servers * int(options.get("channels", 1))

    def open(self) -> Client:
        """Return the client of the connection: the user's, or a new one.

        Raises:
            InvalidRequestError: as `stepwire.connect`.
        """
        if isinstance(self.server, Client):
            return self.server
        target = self.server[0] if len(self.server) == 1 else list(self.server)
        return connect(target, **dict(self.options))
