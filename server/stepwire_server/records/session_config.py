"""The config of a session, in the domain's own terms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Final

import numpy as np

from stepwire.layout import SCALE_SUFFIX, Layout, TensorSpec
from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.durability import Durability
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.optimizers.schedules import Schedule
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines.protocol import PARAM
from stepwire_server.engines.regions import Holding, Region
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.rules import (
    ACCUMULATED,
    AVERAGE,
    Decay,
    Precision,
    Recipe,
    RowSemantics,
    Rule,
    faded_slots,
    has_momentum,
    row_rule,
    rule_for,
)

__all__ = ["SessionConfig"]

_TENSOR_BYTES: Final = 512
"""The bytes of a tensor's objects beside its name, as they were measured."""

_FREE_DESCRIPTION_BYTES: Final = 64 << 10
"""About a hundred tensors: the number of sessions bounds them."""


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
        precision: the precision of the rule's slots, in groups and tensors that name none.
        group_precisions: the precision of each group, in tensors that name none.
        measures: results tell the norms of update and parameters.
        gradient_dtype: default encoding of gradients.
        reply_dtype: the default encoding of replies.
        start_at_zero: parameters start as zeros instead of waiting for a load.
        lease_seconds: how long an unused session lives.
        label: for listings.
        device: where it is to live; empty for the server's choice.
        tells_norms: results tell the gradient's norms.
        durability: the steps that survive a loss of the server, and the times of checkpoints.
        aggregation: the way that gradients of several workers meet; None for one worker.
    """

    layout: Layout
    optimizer: Optimizer
    groups: tuple[Hyperparameters, ...]
    schedules: tuple[Schedule | None, ...]
    group_clips: tuple[float | None, ...]
    treatment: GradientTreatment
    precision: Precision
    group_precisions: tuple[Precision, ...]
    measures: bool
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    start_at_zero: bool
    lease_seconds: float
    label: str
    device: str = ""
    tells_norms: bool = True
    durability: Durability = Durability()
    aggregation: Aggregation | None = None

    @functools.cached_property
    def tables(self) -> dict[int, RowSemantics]:
        """The tables by index, each with the meaning of a step for its rows."""
        return {index: RowSemantics(table.spec.table) for index, table in self.layout.tables.items()}

    @functools.cached_property
    def row_number_bytes(self) -> int:
        """The bytes of the numbers that are kept for rows: four for each row of a table that counts them."""
        counted = [index for index, semantics in self.tables.items() if semantics.counts_rows]
        return 4 * sum(self.layout.tensors[index].spec.shape[0] for index in counted)

    @functools.cached_property
    def hashed_tables(self) -> tuple[int, ...]:
        """The tables whose rows are named by ids, by index."""
        return tuple(index for index, table in self.layout.tables.items() if table.spec.hashed)

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

    @property
    def steps_in_place(self) -> bool:
        """Clients may read the state's own parameters: none reads them while another one's step changes them."""
        together = self.aggregation
        alone = together is None or (together.mode == "sync" and together.required == together.workers)
        return alone and self.reply_dtype == FLOAT32

    @functools.cached_property
    def description_bytes(self) -> int:
        """The bytes that the names and places of tensors hold, beyond what every session may have of them."""
        names = sum(len(tensor.spec.name.encode()) for tensor in self.layout.tensors)
        return max(_TENSOR_BYTES * len(self.layout.tensors) + names - _FREE_DESCRIPTION_BYTES, 0)

    @functools.cached_property
    def rule(self) -> Rule:
        """The formula."""
        return rule_for(self.optimizer, self.momentum)[0]

    @functools.cached_property
    def decay(self) -> Decay:
        """The position and form of weight decay in steps that have some."""
        return rule_for(self.optimizer, self.momentum)[1]

    def recipe(self, hyper: Hyperparameters) -> Recipe:
        """Return the arithmetic of a group's update, for slots that are float32: numbers of 0 leave out idle work."""
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
                forgotten=forgotten,
            )
        return found

    def row_recipe(self, hyper: Hyperparameters, semantics: RowSemantics) -> Recipe:
        """Return the arithmetic of the rows that came, of a table in a group with these numbers."""
        dense = self.recipe(hyper)
        if semantics is RowSemantics.GLOBAL:
            return dense
        rule = row_rule(self.optimizer, semantics, dense.rule)
        faded, forgotten = tuple(faded_slots(semantics, rule)), rule.forgotten(hyper)
        key = (semantics, dense.rule.name, forgotten)
        if (found := self._row_recipes.get(key)) is None:
            found = self._row_recipes[key] = dataclasses.replace(dense, rule=rule, forgotten=forgotten, faded=faded)
        return found

    @functools.cached_property
    def _row_recipes(self) -> dict[tuple[RowSemantics, str, tuple[str, ...]], Recipe]:
        """The recipes of rows so far."""
        return {}

    @functools.cached_property
    def _recipes(self) -> dict[tuple[bool, bool, tuple[str, ...]], Recipe]:
        """The recipes so far, by the numbers that are not 0."""
        return {}

    @property
    def rule_slots(self) -> tuple[str, ...]:
        """The slots of the rule that are kept: none where every tensor is a table with one sum a row."""
        tables, tensors = self.tables, self.layout.tensors
        row_wise = [index for index, semantics in tables.items() if semantics is RowSemantics.ROW_WISE]
        return () if len(row_wise) == len(tensors) else self.rule.slots

    @functools.cached_property
    def slots(self) -> dict[str, Holding]:
        """The state arrays, parameters first, and how each is held."""
        precisions = {region.precision for region in self.regions}
        held: Holding = self.regions if len(precisions) > 1 else next(iter(precisions), Precision.FLOAT32)
        slots: dict[str, Holding] = {PARAM: Precision.FLOAT32, **dict.fromkeys(self.rule_slots, held)}
        if self.treatment.accumulation_steps > 1:
            slots[ACCUMULATED] = Precision.FLOAT32
        if self.treatment.parameter_average_decay is not None:
            slots[AVERAGE] = Precision.FLOAT32
        return slots

    @functools.cached_property
    def visible_slots(self) -> tuple[str, ...]:
        """The slots that are pulled and loaded; those of 8 bits with their maxima, however small the tensors are."""
        scaled = any(tensor.spec.state_precision == Precision.INT8.value for tensor in self.layout.tensors)
        names: list[str] = []
        for name in self.slots:
            names += [name, name + SCALE_SUFFIX] if scaled and name in self.rule.slots else [name]
        return tuple(names)

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """The regions of the flat space in which the rule's slots are held alike, in order; no tensor is in two."""
        regions: list[Region] = []
        for tensor in self.layout.tensors:
            precision = self._held(tensor.spec)
            if regions and regions[-1].precision is precision:
                regions[-1] = regions[-1]._replace(end=tensor.end)
            elif tensor.count:
                regions.append(Region(tensor.offset, tensor.end, precision))
        return tuple(regions)

    @functools.cached_property
    def held_precisions(self) -> tuple[frozenset[Precision], ...]:
        """The precisions in which the slots of each group's tensors are held."""
        found: list[set[Precision]] = [set() for _ in self.groups]
        for tensor in self.layout.tensors:
            found[tensor.spec.group].add(self._held(tensor.spec))
        return tuple(map(frozenset, found))

    def _held(self, spec: TensorSpec) -> Precision:
        """Return how a tensor's slots are held; a rule without slots is that of float32."""
        return Precision(spec.held_precision) if self.rule.slots else Precision.FLOAT32

    @functools.cached_property
    def everything(self) -> TensorSelection:
        """All tensors, the frozen ones too."""
        return TensorSelection(self.layout, frozenset(), whole=True)

    @functools.cached_property
    def active(self) -> TensorSelection:
        """The tensors that a step moves unless it leaves some out: all but the frozen ones."""
        frozen = {index for index, tensor in enumerate(self.layout.tensors) if tensor.spec.frozen}
        return TensorSelection(self.layout, frozenset(frozen))

    def without(self, missing: frozenset[int]) -> TensorSelection:
        """Return the tensors that a step moves which leaves out some more, by index."""
        return TensorSelection(self.layout, self.active.absent | missing) if missing else self.active
