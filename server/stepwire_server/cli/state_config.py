"""A session's numbers and options as texts beside the arrays of a file, and back into arguments of `create_session`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from google.protobuf import json_format

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.optimizers import LARS, OPTIMIZERS, Optimizer
from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire.optimizers.schedules import Schedule, schedule_from_wire
from stepwire.results import SessionConfig
from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from stepwire_server.cli.state_forms import Numbers

__all__ = ["Options", "config_of", "metadata_of", "numbers_of", "optimizer_named", "options_of"]

_CLASSES: Final[dict[str, type[Optimizer]]] = {
    kind.__name__.lower(): kind for kind in (*OPTIMIZERS.values(), stepwire.AdamW, LARS)
}
_TELEMETRY: Final = {
    session_pb2.TELEMETRY_LEVEL_GRADIENT: "gradient",
    session_pb2.TELEMETRY_LEVEL_NONE: "none",
}
_TREATMENT: Final = (
    "non_finite",
    "clip_grad_norm",
    "clip_formula",
    "clip_grad_value",
    "accumulation_steps",
    "missing_gradient",
    "parameter_average_decay",
)
_OPTIONS: Final = (
    *_TREATMENT,
    "frozen",
    "tables",
    "gradient_dtype",
    "reply_dtype",
    "tensor_precision",
    "state_precision",
    "loss_scaling",
    "telemetry",
    "label",
)

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

Options = dict[str, Any]
"""Arguments of `create_session`."""


def config_of(tree: Mapping[str, Any]) -> session_pb2.SessionConfig:
    """Return the config in a manifest.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return json_format.ParseDict(dict(tree), session_pb2.SessionConfig())
    except json_format.ParseError as error:
        raise InvalidRequestError.of("checkpoint", f"its config is none of this release: {str(error)[:200]}") from None


def metadata_of(form: str, message: session_pb2.SessionConfig, numbers: Numbers) -> dict[str, str]:
    """Return the texts beside the arrays."""
    config = SessionConfig.from_wire(message)
    optimizer = {"name": type(config.optimizer).__name__, **dataclasses.asdict(config.optimizer)}
    groups = []
    for index, group in enumerate(message.groups):
        members = [name for name, at in config.membership.items() if at == index]
        own: dict[str, Any] = {"params": members, **config.arguments(index)}
        if group.HasField("schedule"):
            own["schedule"] = json_format.MessageToDict(group.schedule, preserving_proto_field_name=True)
        if group.HasField("clip_grad_norm"):
            own["clip_grad_norm"] = group.clip_grad_norm
        groups.append(own)
    trees = {
        "optimizer": optimizer,
        "groups": groups,
        "options": _options(form, message, config),
        "tensor_steps": numbers.tensor_steps,
        "tensor_scalars": numbers.tensor_scalars,
        "loss_scale": numbers.loss_scale,
        "step": numbers.step,
    }
    return {"form": form, **{name: json.dumps(tree, allow_nan=False) for name, tree in trees.items()}}


def _options(form: str, message: session_pb2.SessionConfig, config: SessionConfig) -> Options:
    treatment = config.treatment
    options: Options = {name: getattr(treatment, name) for name in _TREATMENT}
    options["loss_scaling"] = None if treatment.loss_scaling is None else dataclasses.asdict(treatment.loss_scaling)
    options["frozen"] = [tensor.name for tensor in message.tensors if tensor.frozen]
    options["tables"] = dict(config.tables)
    options["tensor_precision"] = {
        name: precision
        for name, precision in config.tensor_precision.items()
        if precision != "float32" and (form == "stepwire" or precision != "int8")
    }
    for name in ("gradient_dtype", "reply_dtype"):
        options[name] = tensor_pb2.Dtype.Name(getattr(message, name) or tensor_pb2.DTYPE_FLOAT32)[6:].lower()
    options["telemetry"] = _TELEMETRY.get(message.telemetry, "full")
    options["label"] = message.label
    return {name: value for name, value in options.items() if value not in (None, [], {}, "")}


def numbers_of(metadata: Mapping[str, str]) -> Numbers:
    """Return the numbers beside the arrays of a file.

    Raises:
        InvalidRequestError: one is none. The message names the value.
    """
    steps = _decoded(metadata, "tensor_steps", dict[str, _Count], {})
    scalars = _decoded(metadata, "tensor_scalars", dict[str, float], {})
    for name, scalar in scalars.items():
        if not 0.0 <= scalar <= 1.0:
            raise _bad("tensor_scalars", f"{name[:200]!r} has {scalar!r}, which is not in [0, 1]")
    scale = _decoded(metadata, "loss_scale", tuple[float, _Count] | None, None)
    if scale is not None and not 0.0 < scale[0] < math.inf:
        raise _bad("loss_scale", f"{scale[0]!r} is no scale")
    return Numbers(_decoded(metadata, "step", _Count | None, None), steps, scalars, scale)


def options_of(metadata: Mapping[str, str], text: str = "") -> Options:
    """Return the arguments of `create_session` that a file, or a text in place of its optimizer, describes.

    Args:
        metadata: the texts beside the arrays.
        text: an optimizer, such as `{"name": "AdamW", "lr": 0.1}`; empty for the file's.

    Raises:
        InvalidRequestError: an option is none, or has a wrong value. The message names it.
    """
    given = {"optimizer": text} if text else metadata
    if "optimizer" not in given:
        raise _bad("optimizer", 'is missing; give --optimizer, such as \'{"name": "AdamW", "lr": 0.001}\'')
    options: Options = _decoded(metadata, "options", dict[str, Any], {})
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise _bad("options", f"{unknown[0][:200]!r} is none of {', '.join(_OPTIONS)}")
    if (scaling := options.get("loss_scaling")) is not None:
        options["loss_scaling"] = _made(LossScaling, scaling, "options.loss_scaling")
    options["optimizer"] = optimizer_named(_decoded(given, "optimizer", dict[str, Any], {}))
    groups = _decoded(given, "groups", list[dict[str, Any]], [])
    return options | {"groups": [_group(group, index) for index, group in enumerate(groups)]}


def optimizer_named(tree: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer by the name of its class and its arguments.

    Raises:
        InvalidRequestError: there is no such class, or an argument is none.
    """
    values = dict(tree)
    name = str(values.pop("name", ""))
    if (kind := _CLASSES.get(name.lower())) is None:
        raise _bad(
            "optimizer.name", f"{name[:64]!r} is none of {', '.join(kind.__name__ for kind in _CLASSES.values())}"
        )
    if isinstance(values.get("betas"), list):
        values["betas"] = tuple(values["betas"])
    found: Optimizer = _made(kind, values, "optimizer")
    return found


def _group(group: dict[str, Any], index: int) -> dict[str, Any]:
    made = dict(group)
    if isinstance(made.get("betas"), list):
        made["betas"] = tuple(made["betas"])
    if "schedule" in made:
        made["schedule"] = _schedule(made["schedule"], f"groups[{index}].schedule")
    return made


def _schedule(tree: Any, field: str) -> Schedule:
    try:
        message = json_format.ParseDict(tree, optimizer_pb2.Schedule())
    except (json_format.ParseError, AttributeError, TypeError) as error:
        raise _bad(field, f"{str(error)[:200]}") from None
    return schedule_from_wire(message, field)


def _made(kind: Any, values: Any, field: str) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise _bad(field, str(error)[:200]) from None


def _decoded(metadata: Mapping[str, str], name: str, kind: Any, default: Any) -> Any:
    if name not in metadata:
        return default
    try:
        return msgspec.json.decode(metadata[name], type=kind)
    except (ValueError, RecursionError) as error:
        raise _bad(name, f"{metadata[name][:64]!r} is none: {str(error)[:200]}") from None


def _bad(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(f"metadata.{name}", problem)
