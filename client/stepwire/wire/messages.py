"""Conversion between the domain's records and the contract's messages, both ways, for client and server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from stepwire.errors import InvalidRequestError
from stepwire.layout import Layout, Placement, Range, TensorSpec
from stepwire.optimizers import OPTIMIZERS, Adagrad, Adam, AdamW, Formula, Hyperparameters, Optimizer
from stepwire.v1 import optimizer_pb2, precision_pb2, session_pb2, tensor_pb2

__all__ = [
    "FORMULAS",
    "PRECISIONS",
    "SEMANTICS",
    "duration_to_wire",
    "hyperparameters_from_wire",
    "hyperparameters_to_wire",
    "layout_from_wire",
    "layout_to_wire",
    "optimizer_from_wire",
    "optimizer_to_wire",
    "overrides_from_wire",
    "overrides_to_wire",
    "precision_from_wire",
    "seconds_from_wire",
    "spec_from_wire",
    "spec_to_wire",
    "specs_from_wire",
    "table_to_wire",
]

FORMULAS: Final[dict[Formula, optimizer_pb2.Formula]] = {
    "torch": optimizer_pb2.FORMULA_TORCH,
    "keras": optimizer_pb2.FORMULA_KERAS,
    "optax": optimizer_pb2.FORMULA_OPTAX,
    "no_bias_correction": optimizer_pb2.FORMULA_NO_BIAS_CORRECTION,
    "decay_after": optimizer_pb2.FORMULA_DECAY_AFTER,
}
PRECISIONS: Final = {
    "float32": precision_pb2.STATE_PRECISION_FLOAT32,
    "bfloat16": precision_pb2.STATE_PRECISION_BFLOAT16_MOMENTS,
    "int8": precision_pb2.STATE_PRECISION_INT8_MOMENTS,
}
"""The contract's values of the precisions of moments."""

SEMANTICS: Final = {
    "torch_sparse": tensor_pb2.ROW_SEMANTICS_TORCH_SPARSE,
    "row_counter": tensor_pb2.ROW_SEMANTICS_ROW_COUNTER,
    "skipped": tensor_pb2.ROW_SEMANTICS_SKIPPED,
    "global": tensor_pb2.ROW_SEMANTICS_GLOBAL,
    "row_wise": tensor_pb2.ROW_SEMANTICS_ROW_WISE,
}
"""The contract's values of the meanings of a step for the rows of a table."""

_SEMANTICS_NAMES: Final[dict[int, str]] = {value: name for name, value in SEMANTICS.items()}
_PRECISION_NAMES: Final[dict[int, str]] = {value: name for name, value in PRECISIONS.items()}
_FORMULA_NAMES: Final[dict[int, Formula]] = {value: name for name, value in FORMULAS.items()}
_AMSGRAD: Final = {
    "none": optimizer_pb2.AMSGRAD_NONE,
    "raw": optimizer_pb2.AMSGRAD_RAW,
    "corrected": optimizer_pb2.AMSGRAD_CORRECTED,
}
_AMSGRAD_VALUES: Final[dict[int, bool | str]] = {
    optimizer_pb2.AMSGRAD_NONE: False,
    optimizer_pb2.AMSGRAD_RAW: True,
    optimizer_pb2.AMSGRAD_CORRECTED: "corrected",
}
_RULES: Final[dict[str, Any]] = {name: optimizer_pb2.Rule.Value(f"RULE_{name.upper()}") for name in OPTIMIZERS}
_RULE_NAMES: Final[dict[int, str]] = {value: name for name, value in _RULES.items()}


def duration_to_wire(seconds: float) -> Duration:
    """Encode a time in seconds, to the nanosecond."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def seconds_from_wire(duration: Duration) -> float:
    """Decode a time in seconds."""
    return duration.seconds + duration.nanos / 1e9


def optimizer_to_wire(optimizer: Optimizer) -> optimizer_pb2.Optimizer:
    """Encode an optimizer with all its values."""
    structure = optimizer.structure()
    message = optimizer_pb2.Optimizer(
        rule=_RULES[optimizer.rule],
        formula=FORMULAS[structure.formula],
        amsgrad=_AMSGRAD[structure.amsgrad],
        decoupled_weight_decay=structure.decoupled_weight_decay,
        nesterov=structure.nesterov,
        centered=structure.centered,
        hyperparameters=hyperparameters_to_wire(optimizer.hyperparameters()),
    )
    if isinstance(optimizer, Adagrad):
        message.initial_accumulator_value = optimizer.initial_accumulator_value
    return message


def optimizer_from_wire(message: optimizer_pb2.Optimizer, field: str) -> Optimizer:
    """Decode and check an optimizer. An unset field gets the rule's published default.

    Raises:
        InvalidRequestError: the rule does not have an option, or a value is out of range. The message names the option.
    """
    if message.rule not in _RULE_NAMES:
        raise InvalidRequestError.of(f"{field}.rule", f"{message.rule} is not a rule; use one of: {', '.join(_RULES)}")
    kind: type[Optimizer] = OPTIMIZERS[_RULE_NAMES[message.rule]]
    if kind is Adam and message.decoupled_weight_decay:
        kind = AdamW
    options = _options_from_wire(message, kind, field)
    # The defaults are consistent without the flags. With flags they may need numbers, which come next.
    default = _built(kind, {name: value for name, value in options.items() if name == "formula"}, field)
    overrides = overrides_from_wire(message.hyperparameters)
    values = default.hyperparameters().replace(overrides, f"{field}.hyperparameters")
    return _built(kind, options | default.arguments(values), field)


def _options_from_wire(message: optimizer_pb2.Optimizer, kind: type[Optimizer], field: str) -> dict[str, Any]:
    """Return the constructor's options that are set, after a check that the rule has them."""
    formula = message.formula or FORMULAS[kind.published]
    if formula not in _FORMULA_NAMES:
        raise InvalidRequestError.of(f"{field}.formula", f"{formula} is unknown; use one of: {', '.join(FORMULAS)}")
    options: dict[str, Any] = {"formula": _FORMULA_NAMES[formula]}
    if message.amsgrad not in (0, optimizer_pb2.AMSGRAD_NONE):
        options["amsgrad"] = _AMSGRAD_VALUES.get(message.amsgrad, message.amsgrad)
    options |= {name: True for name in ("decoupled_weight_decay", "nesterov", "centered") if getattr(message, name)}
    if message.HasField("initial_accumulator_value"):
        options["initial_accumulator_value"] = message.initial_accumulator_value
    known = {option.name for option in dataclasses.fields(kind)}
    if options["formula"] == kind.published and "formula" not in known:
        del options["formula"]
    for name in options:
        if name not in known:
            raise InvalidRequestError.of(
                f"{field}.{name}", f"{options[name]!r}: the rule {kind.rule!r} has no such option; leave it out"
            )
    return options


def _built(kind: type[Optimizer], arguments: dict[str, Any], field: str) -> Optimizer:
    """Return a new optimizer. An error names the field of the message instead of the constructor's."""
    try:
        return kind(**arguments)
    except InvalidRequestError as problem:
        text, path = str(problem), str(problem.metadata.get("field", ""))
        raise InvalidRequestError(
            text.replace(path, path.replace("optimizer", field, 1), 1),
            metadata={"field": path.replace("optimizer", field, 1)},
        ) from None


def hyperparameters_from_wire(message: optimizer_pb2.Hyperparameters) -> Hyperparameters:
    """Decode the numbers of one group from the server. The rule does not have a number that is unset."""
    return Hyperparameters(**overrides_from_wire(message))


def hyperparameters_to_wire(values: Hyperparameters) -> optimizer_pb2.Hyperparameters:
    """Encode the numbers of one group."""
    return optimizer_pb2.Hyperparameters(
        lr=values.lr,
        beta1=values.beta1,
        beta2=values.beta2,
        eps=values.eps,
        weight_decay=values.weight_decay,
        maximize=values.maximize,
        momentum=values.momentum,
        dampening=values.dampening,
        alpha=values.alpha,
        decay=values.decay,
        trust_coefficient=values.trust_coefficient,
        eps_root=values.eps_root,
    )


def overrides_to_wire(
    optimizer: Optimizer, base: Hyperparameters, overrides: Mapping[str, Any], field: str
) -> optimizer_pb2.Hyperparameters:
    """Encode only the numbers that a user overrides, after a check.

    Args:
        optimizer: the optimizer of the session.
        base: the numbers of the group.
        overrides: the user's numbers, by the names of the constructor or the contract.
        field: the path that an error names.

    Returns:
        The message, with the overridden numbers alone.

    Raises:
        InvalidRequestError: an unknown name, or a value out of range.
    """
    checked = optimizer.override(base, overrides, field)
    names = {"beta1", "beta2"} if "betas" in overrides else set()
    names |= {optimizer.contract_name(name) for name in set(overrides) - {"betas"}}
    return optimizer_pb2.Hyperparameters(**{name: getattr(checked, name) for name in names})


def overrides_from_wire(message: optimizer_pb2.Hyperparameters) -> dict[str, Any]:
    """Return the values that are set, by name."""
    return {field.name: value for field, value in message.ListFields()}


def layout_to_wire(layout: Layout, slots: tuple[str, ...]) -> tensor_pb2.Layout:
    """Encode a layout."""
    return tensor_pb2.Layout(
        size=layout.size,
        tensors=[
            tensor_pb2.TensorPlacement(spec=spec_to_wire(tensor.spec), offset=tensor.offset, count=tensor.count)
            for tensor in layout.tensors
        ],
        groups=[tensor_pb2.GroupPlacement(offset=group.offset, count=group.count) for group in layout.groups],
        slots=slots,
        chunk_alignment=layout.chunk_alignment,
    )


def layout_from_wire(message: tensor_pb2.Layout) -> Layout:
    """Decode a layout."""
    return Layout(
        tensors=tuple(
            Placement(spec_from_wire(tensor.spec), tensor.offset, tensor.count) for tensor in message.tensors
        ),
        groups=tuple(Range(group.offset, group.count) for group in message.groups),
        size=message.size,
        chunk_alignment=message.chunk_alignment or 1,
    )


def precision_from_wire(*values: int) -> str:
    """Decode a precision: the first value that is set, from the tensor's own to the session's; float32 for none."""
    return _PRECISION_NAMES.get(next(filter(None, values), 0), "float32")


def spec_to_wire(spec: TensorSpec) -> tensor_pb2.TensorSpec:
    """Encode one tensor."""
    return tensor_pb2.TensorSpec(
        name=spec.name,
        shape=spec.shape,
        group=spec.group,
        frozen=spec.frozen,
        state_precision=PRECISIONS[spec.state_precision],
        table=table_to_wire(spec) if spec.table else None,
    )


def table_to_wire(spec: TensorSpec) -> tensor_pb2.Table:
    """Encode the table of a tensor that is one."""
    return tensor_pb2.Table(
        semantics=SEMANTICS[spec.table],
        uniform_bound=spec.uniform_bound,
        seed=spec.seed,
        hashed=spec.hashed,
        max_age_steps=spec.max_age_steps,
    )


def spec_from_wire(message: tensor_pb2.TensorSpec, *inherited: int) -> TensorSpec:
    """Decode one tensor, unchecked.

    Args:
        message: the tensor.
        inherited: the precisions of its group and its session, in this order, for a tensor that names none.
    """
    precision = precision_from_wire(message.state_precision, *inherited)
    table = _SEMANTICS_NAMES.get(message.table.semantics, "") if message.HasField("table") else ""
    return TensorSpec(
        message.name,
        tuple(message.shape),
        message.group,
        message.frozen,
        precision,
        table,
        message.table.uniform_bound,
        message.table.seed,
        message.table.hashed,
        message.table.max_age_steps,
    )


def specs_from_wire(config: session_pb2.SessionConfig) -> list[TensorSpec]:
    """Decode the tensors of a config, unchecked but for their groups, which exist."""
    groups = config.groups or [optimizer_pb2.ParameterGroup()]
    return [
        spec_from_wire(tensor, groups[tensor.group].state_precision, config.state_precision)
        for tensor in config.tensors
    ]
