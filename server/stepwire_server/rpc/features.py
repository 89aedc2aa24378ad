"""The options that this build serves, and the refusal of all others that a session may ask for.

The contract names more than this version does. An option that is not served is refused when the session is
created, never ignored: each row is a field, the feature it belongs to, and how to see that a config asks for it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from stepwire.errors import UnsupportedFeatureError
from stepwire.v1 import aggregation_pb2, optimizer_pb2, precision_pb2, session_pb2, tensor_pb2

__all__ = ["SERVED_FEATURES", "refuse_unserved", "unsupported"]

SERVED_FEATURES: Final[tuple[str, ...]] = (
    "accumulation",
    "aggregation",
    "amsgrad_corrected",
    "centered",
    "clip_grad_norm",
    "clip_grad_value",
    "durability_checkpoint",
    "durability_journal",
    "durability_replicated",
    "formula_decay_after",
    "formula_keras",
    "formula_optax",
    "frozen_tensors",
    "group_clipping",
    "loss_scaling",
    "missing_gradients",
    "nesterov",
    "overlap",
    "parameter_average",
    "reply_order",
    "reply_patches",
    "robust_aggregation",
    "row_ids",
    "rule_adadelta",
    "rule_adagrad",
    "rule_adamax",
    "rule_lamb",
    "rule_lars",
    "rule_lion",
    "rule_nadam",
    "rule_radam",
    "rule_rmsprop",
    "rule_sgd",
    "schedules",
    "sparse_rows",
    "state_bfloat16",
    "state_int8",
    "state_mixed",
    "tracing",
    "transport_cuda_ipc",
    "transport_packets",
    "transport_shm",
    "two_phase_clipping",
    "update_norm",
    "wire_int8",
)
"""Optional features, sorted, by the names that the contract's comments use.

They are served on every device, but for transports, which take what a machine has.
"""

_Config = session_pb2.SessionConfig


class _Choice(NamedTuple):
    """An enum of which only some values are served; the feature is in `named`, or else `prefix + value's name`."""

    field: str
    feature_prefix: str
    enum: EnumTypeWrapper
    served: frozenset[int]
    chosen: Callable[[_Config], int]
    named: Mapping[int, str] = types.MappingProxyType({})

    def refused_feature(self, config: _Config) -> str | None:
        value = self.chosen(config)
        if value in self.served:
            return None
        if value in self.named:
            return self.named[value]
        names = self.enum.DESCRIPTOR.values_by_number
        name = names[value].name if value in names else str(value)
        own_prefix = names[0].name.removesuffix("UNSPECIFIED")
        return self.feature_prefix + name.removeprefix(own_prefix).lower()


_SERVED_PRECISIONS: Final = frozenset(precision_pb2.StatePrecision.values())


def _unserved_precision(owners: Iterable[optimizer_pb2.ParameterGroup] | Iterable[tensor_pb2.TensorSpec]) -> int:
    """Return the first precision of groups or tensors that is not served; 0 for none."""
    return next((owner.state_precision for owner in owners if owner.state_precision not in _SERVED_PRECISIONS), 0)


_CHOICES: Final = (
    _Choice(
        "config.optimizer.rule",
        "rule_",
        optimizer_pb2.Rule,
        frozenset(optimizer_pb2.Rule.values()),
        lambda c: c.optimizer.rule,
    ),
    _Choice(
        "config.optimizer.formula",
        "formula_",
        optimizer_pb2.Formula,
        frozenset(optimizer_pb2.Formula.values()),
        lambda c: c.optimizer.formula,
    ),
    _Choice(
        "config.optimizer.amsgrad",
        "amsgrad_",
        optimizer_pb2.Amsgrad,
        frozenset(optimizer_pb2.Amsgrad.values()),
        lambda c: c.optimizer.amsgrad,
    ),
    _Choice(
        "config.gradient.non_finite",
        "non_finite_",
        optimizer_pb2.NonFinitePolicy,
        frozenset(optimizer_pb2.NonFinitePolicy.values()),
        lambda c: c.gradient.non_finite,
    ),
    _Choice(
        "config.gradient.missing_gradient",
        "missing_gradients_",
        optimizer_pb2.MissingGradientPolicy,
        frozenset(optimizer_pb2.MissingGradientPolicy.values()),
        lambda c: c.gradient.missing_gradient,
    ),
    _Choice(
        "config.aggregation.mode",
        "aggregation_",
        aggregation_pb2.AggregationMode,
        frozenset(aggregation_pb2.AggregationMode.values()),
        lambda c: c.aggregation.mode,
    ),
    _Choice(
        "config.aggregation.reduction",
        "reduction_",
        aggregation_pb2.Reduction,
        frozenset(aggregation_pb2.Reduction.values()),
        lambda c: c.aggregation.reduction,
    ),
    _Choice(
        "config.durability",
        "durability_",
        session_pb2.Durability,
        frozenset(session_pb2.Durability.values()),  # without a data directory, the decoder refuses
        lambda c: c.durability,
    ),
    _Choice(
        "config.initialization",
        "initialization_",
        session_pb2.Initialization,
        frozenset(session_pb2.Initialization.values()),
        lambda c: c.initialization,
    ),
    _Choice(
        "config.state_precision",
        "state_",
        precision_pb2.StatePrecision,
        _SERVED_PRECISIONS,
        lambda c: c.state_precision,
    ),
    _Choice(
        "config.groups.state_precision",
        "state_",
        precision_pb2.StatePrecision,
        _SERVED_PRECISIONS,
        lambda c: _unserved_precision(c.groups),
    ),
    _Choice(
        "config.tensors.state_precision",
        "state_",
        precision_pb2.StatePrecision,
        _SERVED_PRECISIONS,
        lambda c: _unserved_precision(c.tensors),
    ),
    _Choice(
        "config.telemetry",
        "telemetry_",
        session_pb2.TelemetryLevel,
        frozenset(session_pb2.TelemetryLevel.values()),
        lambda c: c.telemetry,
    ),
    _Choice(
        "config.gradient.clip_formula",
        "clip_formula_",
        optimizer_pb2.ClipFormula,
        frozenset(optimizer_pb2.ClipFormula.values()),
        lambda c: c.gradient.clip_formula,
    ),
    _Choice(
        "config.gradient_dtype",
        "wire_",
        tensor_pb2.Dtype,
        frozenset(tensor_pb2.Dtype.values()),
        lambda c: c.gradient_dtype,
    ),
    # Replies in int8 are no feature that another server may have: the decoder says so.
    _Choice(
        "config.reply_dtype",
        "wire_",
        tensor_pb2.Dtype,
        frozenset(tensor_pb2.Dtype.values()),
        lambda c: c.reply_dtype,
    ),
)


def refuse_unserved(config: _Config) -> None:
    """Refuse the first option of a config that this build does not serve.

    Raises:
        UnsupportedFeatureError: names the field and the feature.
    """
    for choice in _CHOICES:
        if (feature := choice.refused_feature(config)) is not None:
            raise unsupported(choice.field, feature)


def unsupported(field: str, feature: str) -> UnsupportedFeatureError:
    """Say that a field asks for what this server does not do."""
    return UnsupportedFeatureError(
        f"{field} asks for {feature!r}, which this server does not serve; leave it out, or use a server whose "
        "GetServerInfo lists it",
        metadata={"field": field, "feature": feature},
    )
