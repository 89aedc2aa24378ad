"""Making the session of an optimizer, and finding one to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from stepwire.client import Client
from stepwire.errors import InvalidRequestError
from stepwire.results import SessionConfig
from stepwire.session import Session
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.rules import Family, Group

__all__ = ["create_session", "find_session"]

_TREATMENT: Final = ("clip_grad_norm", "clip_grad_value", "non_finite")
"""Options of a gradient's treatment, which a session has from its creation."""


def create_session(
    client: Client, options: RemoteOptions, family: Family, parameters: Parameters, groups: Sequence[Group]
) -> Session:
    """Create a session with the parameters' present values.

    Raises:
        StepwireError: as `Client.create_session`.
    """
    return client.create_session(
        parameters.fetch(),
        optimizer=family.configuration(groups),
        groups=[
            {"params": parameters.members(index), **family.numbers_of(group)} for index, group in enumerate(groups)
        ],
        gradient_dtype=options.gradient_dtype or parameters.dtype,
        error_feedback=options.error_feedback,
        reply_dtype=options.reply_dtype or parameters.dtype,
        state_precision=options.state_precision,
        telemetry=options.telemetry,
        missing_gradient="keep",  # as torch: a parameter without a gradient, its moments and its t stay
        lease_seconds=options.lease_seconds,
        device=options.device,
        label=options.label,
        **{name: getattr(options, name) for name in _TREATMENT},
    )


def find_session(
    client: Client,
    session_id: str,
    options: RemoteOptions,
    family: Family,
    parameters: Parameters,
    groups: Sequence[Group],
) -> Session:
    """Find a session, see that it is that of these parameters, and take its slot.

    Raises:
        InvalidRequestError: it is of another model, another optimizer, or other options.
        StepwireError: as `Client.session`.
    """
    session = client.session(session_id, error_feedback=options.error_feedback)
    difference = (
        _of_tensors(session, parameters)
        or _of_groups(session.config, parameters)
        or _of_optimizer(session.config, family, groups)
        or _of_options(session.config, options)
    )
    if difference:
        raise InvalidRequestError(
            f"session {session_id!r} is not that of this optimizer: {difference}; make the model and the optimizer as "
            "they were when the session was created, or leave `session` out for a new one",
            metadata={"field": "session"},
        )
    session.attach()
    return session


def _of_tensors(session: Session, parameters: Parameters) -> str:
    held = session.shapes
    for tensor in parameters.tensors:
        if tensor.name not in held:
            return f"it has no tensor {tensor.name!r}, but {', '.join(map(repr, list(held)[:3]))}, …"
        if held[tensor.name] != tensor.shape:
            return f"{tensor.name!r} has shape {held[tensor.name]} there and {tensor.shape} here"
    extra = next((name for name in held if name not in parameters.membership), None)
    return f"it has a tensor {extra!r} that the model has not" if extra else ""


def _of_groups(configuration: SessionConfig, parameters: Parameters) -> str:
    for name, group in configuration.membership.items():
        if group != parameters.membership[name]:
            return f"{name!r} is in group {group} there and in {parameters.membership[name]} here"
    return ""


def _of_optimizer(configuration: SessionConfig, family: Family, groups: Sequence[Group]) -> str:
    theirs, ours = configuration.optimizer, family.configuration(groups)
    same = (theirs.rule, theirs.structure()) == (ours.rule, ours.structure())
    return "" if same else f"it runs {theirs!r} and this is {ours!r}"


def _of_options(configuration: SessionConfig, options: RemoteOptions) -> str:
    theirs: dict[str, Any] = {name: getattr(configuration.treatment, name) for name in _TREATMENT}
    theirs["state_precision"] = configuration.state_precision
    for name, value in theirs.items():
        if value != getattr(options, name):
            return f"it has {name}={value!r} and this has {getattr(options, name)!r}"
    return ""
