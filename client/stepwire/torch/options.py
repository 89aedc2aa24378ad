"""What `stepwire.torch`'s optimizers take beside torch's own arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stepwire.client import Client, StatePrecision, Telemetry
from stepwire.connecting import connect
from stepwire.optimizers.gradient_treatment import NonFinite

__all__ = ["RemoteOptions", "split_options"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """Where the optimizer's state lives, and how gradients get there.

    Attributes:
        server: `host:port`, `unix:/path`, several of them for a model cut over servers, or a `stepwire.Client`.
        session: the id of a session to go on with instead of a new one: its parameters are pulled into the model.
        transport: as `stepwire.connect` takes it.
        channels: as `stepwire.connect` takes it.
        timeout: seconds of a step or another call with all its repetitions.
        clip_grad_norm: bound of the global gradient norm, as `torch.nn.utils.clip_grad_norm_` clips before a step.
        clip_grad_value: bound of each element, as `torch.nn.utils.clip_grad_value_`.
        non_finite: what to do with NaN and Inf in a gradient: `"reject"` raises an error that names the first such
            tensor and leaves everything as it is, `"skip"` takes the step without an update, `"allow"` applies it, as
            torch does.
        gradient_dtype: how gradients travel; default the parameters' dtype, or float32 where they have several.
        reply_dtype: how parameters come back; default likewise.
        error_feedback: with `gradient_dtype="int8"`, see `Client.create_session`.
        state_precision: how the server holds moments: `"float32"`, `"bfloat16"` or `"int8"`.
        telemetry: what `last_result` tells, as `Client.create_session` has it; `"none"` with `non_finite="allow"`
            leaves out the pass over the gradient that torch's optimizers do not make either.
        amp_scaling: let GradScaler hand scaled gradients over, to be unscaled on the server; False has it unscale them
            here, which takes a pass over them.
        shared_views: make parameters and `.grad` views of the memory that is shared with a server on this host, so that
            a step copies nothing. See `stepwire.torch`.
        send_in_backward: send each gradient as soon as the backward pass has made it. See `stepwire.torch`.
        light_state_dict: `state_dict()` holds the session's id instead of its tensors.
        lease_seconds: how long the session lives unused; default the server's longest.
        device: where the state lives, by the server's name of it; default the server's choice.
        label: text for listings.
    """

    server: str | Sequence[str] | Client = "localhost:50051"
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
    telemetry: Telemetry = "full"
    amp_scaling: bool = True
    shared_views: bool = False
    send_in_backward: bool = False
    light_state_dict: bool = False
    lease_seconds: float | None = None
    device: str = ""
    label: str = ""

    def client(self) -> Client:
        """Return a client of the server: the user's own, or a new one.

        Raises:
            InvalidRequestError: there is no such target or transport.
        """
        if isinstance(self.server, Client):
            return self.server
        return connect(self.server, transport=self.transport, channels=self.channels, timeout=self.timeout)

    @property
    def owns_client(self) -> bool:
        """Closing the optimizer closes the client too."""
        return not isinstance(self.server, Client)


_NAMES = frozenset(field.name for field in dataclasses.fields(RemoteOptions))


def split_options(arguments: dict[str, Any]) -> tuple[RemoteOptions, dict[str, Any]]:
    """Part keyword arguments into ours and torch's."""
    ours = {name: value for name, value in arguments.items() if name in _NAMES}
    return RemoteOptions(**ours), {name: value for name, value in arguments.items() if name not in _NAMES}
