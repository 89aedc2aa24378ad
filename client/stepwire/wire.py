"""Between the domain's records and the contract's messages, both ways, for client and server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from stepwire.errors import InvalidRequestError
from stepwire.layout import Layout, Placement, Span, TensorSpec
from stepwire.optimizers import Adam, Formula, Hyperparameters
from stepwire.v1 import optimizer_pb2, tensor_pb2

__all__ = [
    "FORMULAS",
    "formula_from_wire",
    "hyperparameters_from_wire",
    "hyperparameters_to_wire",
    "layout_from_wire",
    "layout_to_wire",
    "optimizer_to_wire",
    "overrides_from_wire",
    "overrides_to_wire",
    "spec_from_wire",
    "spec_to_wire",
]

FORMULAS: Final[dict[Formula, optimizer_pb2.Formula]] = {
    "torch": optimizer_pb2.FORMULA_TORCH,
    "keras": optimizer_pb2.FORMULA_KERAS,
    "optax": optimizer_pb2.FORMULA_OPTAX,
    "no_bias_correction": optimizer_pb2.FORMULA_NO_BIAS_CORRECTION,
    "decay_after": optimizer_pb2.FORMULA_DECAY_AFTER,
}
_FORMULA_NAMES: Final[dict[int, Formula]] = {value: name for name, value in FORMULAS.items()}


def formula_from_wire(value: int) -> Formula:
    """Return the formula's name; unspecified means torch's."""
    if value == optimizer_pb2.FORMULA_UNSPECIFIED:
        return "torch"
    if value not in _FORMULA_NAMES:
        raise InvalidRequestError(
            f"optimizer.formula: {value} is unknown", metadata={"field": "config.optimizer.formula"}
        )
    return _FORMULA_NAMES[value]


def optimizer_to_wire(optimizer: Adam) -> optimizer_pb2.Optimizer:
    """Encode an optimizer with all its values."""
    return optimizer_pb2.Optimizer(
        rule=optimizer_pb2.RULE_ADAM,
        formula=FORMULAS[optimizer.formula],
        amsgrad=optimizer_pb2.AMSGRAD_RAW if optimizer.amsgrad else optimizer_pb2.AMSGRAD_NONE,
        decoupled_weight_decay=optimizer.decoupled_weight_decay,
        hyperparameters=hyperparameters_to_wire(optimizer.hyperparameters()),
    )


def hyperparameters_from_wire(message: optimizer_pb2.Hyperparameters) -> Hyperparameters:
    """Decode the numbers of one group, all of them set."""
    return Hyperparameters(
        lr=message.lr,
        beta1=message.beta1,
        beta2=message.beta2,
        eps=message.eps,
        weight_decay=message.weight_decay,
        maximize=message.maximize,
    )


def hyperparameters_to_wire(values: Hyperparameters) -> optimizer_pb2.Hyperparameters:
    """Encode the numbers of one group."""
    return optimizer_pb2.Hyperparameters(
        lr=values.lr,
        beta1=values.beta1,
        beta2=values.beta2,
        eps=values.eps,
        weight_decay=values.weight_decay,
        maximize=values.maximize,
    )


def overrides_to_wire(base: Hyperparameters, overrides: Mapping[str, Any], field: str) -> optimizer_pb2.Hyperparameters:
    """Encode only what a user overrides, after checking it.

    Raises:
        InvalidRequestError: an unknown name or a value out of range.
    """
    checked = base.replace(overrides, field)
    names = {"beta1", "beta2"} if "betas" in overrides else set()
    names |= set(overrides) - {"betas"}
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
    )


def layout_from_wire(message: tensor_pb2.Layout) -> Layout:
    """Decode a layout."""
    return Layout(
        tensors=tuple(
            Placement(spec_from_wire(tensor.spec), tensor.offset, tensor.count) for tensor in message.tensors
        ),
        groups=tuple(Span(group.offset, group.count) for group in message.groups),
        size=message.size,
    )


def spec_to_wire(spec: TensorSpec) -> tensor_pb2.TensorSpec:
    """Encode one tensor."""
    return tensor_pb2.TensorSpec(name=spec.name, shape=spec.shape, group=spec.group)


def spec_from_wire(message: tensor_pb2.TensorSpec) -> TensorSpec:
    """Decode one tensor, unchecked."""
    return TensorSpec(message.name, tuple(message.shape), message.group)
