"""A case of a sweep: an optimizer with its numbers, the framework that owns its form, and its regimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from conformance.case import Build
from stepwire.optimizers import Optimizer

__all__ = ["CHANGES", "Numbers", "Variant", "changing", "changing_among"]

Numbers = Mapping[int, Mapping[str, Any]]
"""By the number of a step, the values that replace the optimizer's own in that step, by stepwire's names."""

_PERIOD: Final = 7

CHANGES: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "lr changes": [{"lr": 1e-3}, {"lr": 3e-2}, {"lr": 0.0}, {"lr": 1e-5}],
    "betas change": [
        {"betas": (0.9, 0.999)},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.99)},
        {"betas": (0.95, 0.999)},
    ],
    "decay changes": [{"weight_decay": 0.0}, {"weight_decay": 0.1}, {"weight_decay": 1e-5}],
    "momentum changes": [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5}],
    "momentum pauses": [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5}],
    "momentum varies": [{"momentum": 0.9}, {"momentum": 0.3}],
    "eps changes": [{"eps": 1e-8}, {"eps": 1e-2}, {"eps": 0.0}],
}
"""Values that replace each other in the middle of a run, by the name of the change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One case.

    Attributes:
        name: unique among all.
        framework: "torch", "optax", "keras" or "hand".
        optimizer: the rule with its numbers, as stepwire has it.
        build: builds the same of the framework, from parameters and a precision.
        numbers: what changes in the middle of the run.
        treatment: the options of `GradientTreatment`.
        precision: the precision of moments.
        bank: the regimes.
        steps: the number of steps in the short form.
        long_steps: the number of steps in the long form.
        loss_scale: the factor of the gradients that are sent.
        slot: the slot that is compared.
        layerwise: the rule sees the tensors of the regimes; others see one tensor.
        short: the case is one of the short form.
    """

    name: str
    framework: str
    optimizer: Optimizer
    build: Build
    numbers: Numbers = dataclasses.field(default_factory=dict)
    treatment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "float32"
    bank: str = "all"
    steps: int = 60
    long_steps: int = 600
    loss_scale: float = 1.0
    slot: str = "param"
    layerwise: bool = False
    short: bool = False

    @property
    def family(self) -> str:
        """The rule, the framework and the precision, without options."""
        name = self.name.partition(",")[0]
        return name if self.precision == "float32" else f"{name}, {self.precision}"


def changing(name: str, steps: int) -> Numbers:
    """Return the numbers of a run in which a change of `CHANGES` happens again and again."""
    return changing_among(CHANGES[name], steps)


def changing_among(values: Sequence[Mapping[str, Any]], steps: int) -> Numbers:
    """Return the numbers of a run that has each of some values for a few steps, again and again."""
    return {number: values[(number - 1) // _PERIOD % len(values)] for number in range(1, steps + 1)}
