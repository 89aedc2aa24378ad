"""A case to generate: its name, the config of its session, and the reference that computes the expected numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from conformance.inputs import SHAPES, Tensors

__all__ = ["Build", "Case", "Json", "Reference", "Steps", "camel", "session_config"]

Json = dict[str, Any]


class Reference(Protocol):
    """An optimizer of some framework, over named tensors."""

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Apply one step; None is a tensor without a gradient. Return `Telemetry` in JSON, as far as known."""

    def parameters(self) -> Tensors:
        """Return the parameters."""

    def slots(self) -> dict[str, Tensors]:
        """Return the optimizer's own state by the names that stepwire gives it."""

    def tensor_steps(self) -> dict[str, int]:
        """Return the number of updates of each tensor; empty if the framework does not count."""


Steps = Sequence[Json]
"""The special steps of a case; see "steps" in the README."""

Build = Callable[[Tensors, str], Reference]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One case of one file."""

    name: str
    reference: str
    config: Json
    build: Build
    family: str
    steps: Steps = ()
    checkpoints: Sequence[int] = (1, 2, 10, 1000)
    ulp_checkpoints: int = 2
    bank: str = "small"
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    states: bool = True
    counts: bool = False


def camel(values: Mapping[str, Any]) -> Json:
    """Spell field names as protobuf's JSON form does."""
    return {re.sub("_([a-z])", lambda match: match[1].upper(), name): value for name, value in values.items()}


def session_config(
    rule: str,
    hyper: Mapping[str, Any] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    tensor_groups: Mapping[str, int] | None = None,
    tensor_precision: Mapping[str, str] | None = None,
    frozen: Sequence[str] = (),
    groups: Sequence[Json] = (),
    gradient: Json | None = None,
    session: Json | None = None,
    **optimizer: Any,
) -> Json:
    """Write a `SessionConfig` in protobuf's JSON form."""
    tensors: list[Json] = []
    for name, shape in (shapes or SHAPES).items():
        tensor: Json = {"name": name, "shape": list(shape)}
        if (group := (tensor_groups or {}).get(name, 0)) != 0:
            tensor["group"] = group
        if (precision := (tensor_precision or {}).get(name)) is not None:
            tensor["statePrecision"] = f"STATE_PRECISION_{precision}"
        if name in frozen:
            tensor["frozen"] = True
        tensors.append(tensor)
    config: Json = {"tensors": tensors, "optimizer": {"rule": f"RULE_{rule}", **camel(optimizer)}}
    if hyper:
        config["optimizer"]["hyperparameters"] = camel(hyper)
    if groups:
        config["groups"] = list(groups)
    if gradient:
        config["gradient"] = camel(gradient)
    return config | camel(session or {})
