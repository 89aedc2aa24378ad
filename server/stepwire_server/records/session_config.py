"""The config of a session, in the domain's own terms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from stepwire.layout import SMALLEST_IN_BLOCKS, Layout
from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.optimizers.schedules import Schedule
from stepwire_server.engines.protocol import PARAM, Range
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.rules import ACCUMULATED, AVERAGE, Decay, Precision, Recipe, Rule, has_momentum, rule_for

__all__ = ["SCALE_SUFFIX", "SessionConfig"]

SCALE_SUFFIX = "_scale"
"""Beside an 8-bit slot "s", "s_scale" repeats each block's maximum for its elements."""


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """A validated session configuration.

    Attributes:
        layout: where the tensors lie.
        optimizer: the formula and its structure.
        groups: the numbers of each group.
        schedules: the schedule of each group's learning rate, or None.
        group_clips: the bound of each group's own norm, or None.
        treatment: what happens to gradients.
        precision: how the rule's slots are held.
        measures: results tell the norms of update and parameters.
        gradient_dtype: default encoding of gradients.
        reply_dtype: the default encoding of replies.
        start_at_zero: parameters start as zeros instead of waiting for a load.
        lease_seconds: how long an unused session lives.
        label: for listings.
        device: where it is to live; empty for the server's choice.
        tells_norms: results tell the gradient's norms.
    """

    layout: Layout
    optimizer: Optimizer
    groups: tuple[Hyperparameters, ...]
    schedules: tuple[Schedule | None, ...]
    group_clips: tuple[float | None, ...]
    treatment: GradientTreatment
    precision: Precision
    measures: bool
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    start_at_zero: bool
    lease_seconds: float
    label: str
    device: str = ""
    tells_norms: bool = True

    @functools.cached_property
    def momentum(self) -> bool:
        """A momentum buffer is kept, where that is a choice."""
        return has_momentum(self.groups)

    @functools.cached_property
    def scheduled(self) -> bool:
        """A group's learning rate has a schedule."""
        return any(self.schedules)

    @functools.cached_property
    def squares(self) -> bool:
        """The squares of a gradient are summed: somebody wants its norm, or has to know whether it is finite."""
        treatment = self.treatment
        decides = treatment.policy != "allow" or treatment.two_phase or treatment.accumulation_steps > 1
        clips = treatment.clip_grad_norm is not None or any(clip is not None for clip in self.group_clips)
        return self.tells_norms or decides or clips

    @functools.cached_property
    def rule(self) -> Rule:
        """The formula."""
        return rule_for(self.optimizer, self.momentum)[0]

    @functools.cached_property
    def decay(self) -> Decay:
        """The position and form of weight decay in steps that have some."""
        return rule_for(self.optimizer, self.momentum)[1]

    def recipe(self, hyper: Hyperparameters) -> Recipe:
        """Return the arithmetic of a group's update: numbers of 0 leave out the work that they make idle."""
        momentum, decays, forgotten = bool(hyper.momentum), bool(hyper.weight_decay), self.rule.forgotten(hyper)
        key = (momentum, decays, forgotten)
        if (found := self._recipes.get(key)) is None:
            treatment = self.treatment
            found = self._recipes[key] = Recipe(
                rule=rule_for(self.optimizer, momentum)[0],
                decay=self.decay if decays else Decay.NONE,
                accumulates=treatment.accumulation_steps > 1,
                limits=treatment.clip_grad_value is not None,
                averages=treatment.parameter_average_decay is not None,
                measures=self.measures or treatment.clip_grad_value is not None,
                precision=self.precision,
                forgotten=forgotten,
            )
        return found

    @functools.cached_property
    def _recipes(self) -> dict[tuple[bool, bool, tuple[str, ...]], Recipe]:
        """The recipes so far, by the numbers that are not 0."""
        return {}

    @functools.cached_property
    def slots(self) -> dict[str, Precision]:
        """The state arrays, parameters first, and how each is held."""
        slots = {PARAM: Precision.FLOAT32, **dict.fromkeys(self.rule.slots, self.precision)}
        if self.treatment.accumulation_steps > 1:
            slots[ACCUMULATED] = Precision.FLOAT32
        if self.treatment.parameter_average_decay is not None:
            slots[AVERAGE] = Precision.FLOAT32
        return slots

    @functools.cached_property
    def visible_slots(self) -> tuple[str, ...]:
        """The slots that are pulled and loaded."""
        names: list[str] = []
        for name, precision in self.slots.items():
            names += [name, name + SCALE_SUFFIX] if precision is Precision.INT8 else [name]
        return tuple(names)

    @functools.cached_property
    def kept(self) -> tuple[Range, ...]:
        """Ranges that 8-bit slots hold as float32: those of small tensors, in order."""
        if self.precision is not Precision.INT8:
            return ()
        ranges: list[Range] = []
        for tensor in self.layout.tensors:
            if 0 < tensor.count < SMALLEST_IN_BLOCKS:
                if ranges and ranges[-1][1] == tensor.offset:
                    ranges[-1] = (ranges[-1][0], tensor.end)
                else:
                    ranges.append((tensor.offset, tensor.end))
        return tuple(ranges)

    @functools.cached_property
    def everything(self) -> TensorSelection:
        """All tensors, the frozen ones too."""
        return TensorSelection(self.layout, frozenset())

    @functools.cached_property
    def active(self) -> TensorSelection:
        """The tensors that a step moves unless it leaves some out: all but the frozen ones."""
        frozen = {index for index, tensor in enumerate(self.layout.tensors) if tensor.spec.frozen}
        return TensorSelection(self.layout, frozenset(frozen))

    def without(self, missing: frozenset[int]) -> TensorSelection:
        """Return the tensors that a step moves which leaves out some more, by index."""
        return TensorSelection(self.layout, self.active.absent | missing) if missing else self.active
