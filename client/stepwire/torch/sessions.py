"""Creating the session of an optimizer, and resuming one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from stepwire.arrays.groups import precisions_by_name
from stepwire.client import Client
from stepwire.errors import InvalidRequestError
from stepwire.results import SessionConfig
from stepwire.session import Session
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.tables import SparseGradients
from stepwire.torch.workers import aggregation_of, refuse_options_among_workers, with_job

__all__ = ["PRECISION", "create_session", "find_session"]

PRECISION: Final = "state_precision"
"""The key of a parameter group's own precision, which is fixed at a session's creation."""

_TREATMENT: Final = ("clip_grad_norm", "clip_grad_value", "non_finite")
"""The options of a gradient's treatment, which are fixed at a session's creation."""


def create_session(
    client: Client, options: RemoteOptions, rule: TorchRule, parameters: Parameters, groups: Sequence[Group]
) -> Session:
    """Create a session with the parameters' present values.

    Raises:
        StepwireError: as `Client.create_session`.
    """
    try:
        return _created(client, options, rule, parameters, groups)
    except InvalidRequestError as error:
        raise with_job(error, options) from error


def _created(
    client: Client, options: RemoteOptions, rule: TorchRule, parameters: Parameters, groups: Sequence[Group]
) -> Session:
    aggregation = aggregation_of(options)
    return client.create_session(
        parameters.fetch(),
        optimizer=rule.optimizer_for(groups),
        groups=[
            {"params": parameters.members(index), **rule.numbers_of(group), PRECISION: group.get(PRECISION)}
            for index, group in enumerate(groups)
        ],
        gradient_dtype=options.gradient_dtype or parameters.dtype,
        error_feedback=options.error_feedback,
        reply_dtype=options.reply_dtype or parameters.dtype,
        state_precision=options.state_precision,
        tensor_precision=_own_precisions(options, parameters),
        tables=SparseGradients(rule, options).tables(parameters, groups),
        telemetry=options.telemetry,
        durability=options.durability,
        missing_gradient="keep",  # as with torch, a parameter without a gradient keeps its value, its moments and its t
        lease_seconds=options.lease_seconds,
        device=options.device,
        label=options.label,
        keep=options.keep,
        logger=options.logger,
        aggregation=aggregation,
        worker=0 if options.worker is None else options.worker,
        request_id=None if aggregation is None else options.job,
        **{name: getattr(options, name) for name in _TREATMENT},
    )


def find_session(
    client: Client,
    session_id: str,
    options: RemoteOptions,
    rule: TorchRule,
    parameters: Parameters,
    groups: Sequence[Group],
) -> Session:
    """Attach to an existing session, after a check that it is the session of these parameters.

    Args:
        client: the client.
        session_id: the id of the session.
        options: the options of the optimizer.
        rule: the rule.
        parameters: the model's parameters.
        groups: torch's parameter groups.

    Returns:
        The session, attached.

    Raises:
        InvalidRequestError: the session is of another model, another optimizer, or other options.
        StepwireError: as `Client.session`.
    """
    worker = 0 if options.worker is None else options.worker
    session = client.session(session_id, worker=worker, error_feedback=options.error_feedback, logger=options.logger)
    difference = (
        _of_tensors(session, parameters)
        or _of_groups(session.config, parameters)
        or _of_optimizer(session.config, rule, groups)
        or _of_options(session.config, options)
        or _of_tables(session.config, SparseGradients(rule, options).meaning(groups))
        or _of_workers(session.config, options)
        or _of_precision(session.config, options, parameters, groups)
    )
    if difference:
        raise InvalidRequestError.of(
            "session",
            f"{session_id!r} is not the session of this optimizer: {difference}. Make the model and the optimizer as "
            "at the session's creation, or leave `session` out for a new one",
        )
    session.attach()
    return session


def _of_tensors(session: Session, parameters: Parameters) -> str:
    shapes = session.shapes
    for tensor in parameters.tensors:
        if tensor.name not in shapes:
            return f"it has no tensor {tensor.name!r}, but {', '.join(map(repr, list(shapes)[:3]))}, …"
        if shapes[tensor.name] != tensor.shape:
            return f"{tensor.name!r} has shape {shapes[tensor.name]} there and {tensor.shape} here"
    extra = next((name for name in shapes if name not in parameters.membership), None)
    return f"it has a tensor {extra!r} that the model has not" if extra else ""


def _of_groups(configuration: SessionConfig, parameters: Parameters) -> str:
    for name, group in configuration.membership.items():
        if group != parameters.membership[name]:
            return f"{name!r} is in group {group} there and in {parameters.membership[name]} here"
    return ""


def _of_optimizer(configuration: SessionConfig, rule: TorchRule, groups: Sequence[Group]) -> str:
    theirs, ours = configuration.optimizer, rule.optimizer_for(groups)
    same = (theirs.rule, theirs.structure()) == (ours.rule, ours.structure())
    return "" if same else f"it runs {theirs!r} and this is {ours!r}"


def _of_options(configuration: SessionConfig, options: RemoteOptions) -> str:
    theirs: dict[str, Any] = {name: getattr(configuration.treatment, name) for name in _TREATMENT}
    theirs["state_precision"] = configuration.state_precision
    for name, value in theirs.items():
        if value != getattr(options, name):
            return f"it has {name}={value!r} and this has {getattr(options, name)!r}"
    return ""


def _of_tables(configuration: SessionConfig, meaning: str | None) -> str:
    for name, semantics in configuration.tables.items():
        if configuration.aggregation is not None:
            return f"{name!r} is a table of several workers, and a model would lack the rows of the others"
        if semantics != meaning:
            return f"the rows of {name!r} are stepped as {semantics!r} there and as {meaning!r} here"
    return ""


def _of_workers(configuration: SessionConfig, options: RemoteOptions) -> str:
    theirs, ours = configuration.aggregation, aggregation_of(options)
    if theirs is None:
        return "" if ours is None else "it has one worker and this is one of several"
    if ours is not None and ours != theirs:
        return f"it has {theirs!r} and this has {ours!r}"
    if options.worker is None:
        return f"it has {theirs.workers} workers; give worker=, the index of this one"
    refuse_options_among_workers(options)
    return ""


def _of_precision(
    configuration: SessionConfig, options: RemoteOptions, parameters: Parameters, groups: Sequence[Group]
) -> str:
    own = _own_precisions(options, parameters)
    for name, group in parameters.membership.items():
        ours = own.get(name) or groups[group].get(PRECISION) or options.state_precision
        if (theirs := configuration.tensor_precision[name]) != ours:
            return f"the moments of {name!r} are in {theirs!r} there and in {ours!r} here"
    return ""


def _own_precisions(options: RemoteOptions, parameters: Parameters) -> dict[str, Any]:
    """Return the precision of each parameter that has one of its own, by name; a module's name ends at a dot."""
    return precisions_by_name(parameters.membership, options.tensor_precision or {}, ".")
