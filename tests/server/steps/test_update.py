"""The numbers of one update, its way through the state, and the trust ratio of each tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec
from stepwire.optimizers import LAMB, LARS, SGD, Adam, AdamW
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.optimizers.schedules import Schedule
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Decay, Precision, Recipe
from stepwire_server.steps.gradient import StagedGradient
from stepwire_server.steps.tensor_steps import CountedSegment, TensorSteps
from stepwire_server.steps.update import (
    SegmentPass,
    Update,
    effective_groups,
    gradient_factor,
    passes,
    trusted,
)
from tests.server.configs import make_config

SPEC = TensorSpec("w", (4,))


def request(groups: Any, **fields: Any) -> StepRequest:
    return StepRequest(1, 0, FLOAT32, FLOAT32, True, 1 << 20, tuple(groups))._replace(**fields)


# --- learning rates -------------------------------------------------------------------------------------------

TWO = (Adam(lr=0.5).hyperparameters(), Adam(lr=0.25).hyperparameters())


@pytest.mark.parametrize(("updates", "expected"), [((0, 0), 0.5), ((1, 9), 0.375), ((2, 0), 0.25), ((9, 0), 0.0)])
def test_a_schedule_counts_the_updates_of_its_own_group(updates: tuple[int, int], expected: float) -> None:
    config = make_config(SPEC, groups=TWO, schedules=(Schedule.linear(4), None))
    effective = effective_groups(config, request(TWO), updates)
    assert effective == (TWO[0].replace({"lr": expected}), TWO[1])


def test_a_steps_own_learning_rate_comes_before_the_schedules() -> None:
    config = make_config(SPEC, groups=TWO, schedules=(Schedule.linear(4), Schedule.linear(4)))
    effective = effective_groups(config, request(TWO, own_lr=(True, False)), (2, 2))
    assert [numbers.lr for numbers in effective] == [0.5, 0.125]


def test_without_schedules_the_requests_numbers_are_used_as_they_are() -> None:
    wanted = request(TWO)
    assert effective_groups(make_config(SPEC, groups=TWO), wanted, (3, 3)) is wanted.groups


@pytest.mark.parametrize(("updates", "shown"), [(9, "1e\\+39"), (10, "1e\\+40"), (400, "inf|1.7.*e\\+308")])
def test_a_scheduled_learning_rate_beyond_float32_is_refused_by_its_group(updates: int, shown: str) -> None:
    groups = (TWO[0], TWO[1].replace({"lr": 1e30}))
    config = make_config(SPEC, groups=groups, schedules=(None, Schedule.exponential(10.0)))
    assert effective_groups(config, request(groups), (0, 0)) == groups
    assert effective_groups(config, request(groups), (0, 7))[1].lr == pytest.approx(1e37)
    with pytest.raises(InvalidRequestError, match=f"after {updates} updates is ({shown}), .* up to 3.4e") as refused:
        effective_groups(config, request(groups), (0, updates))
    assert refused.value.metadata == {"field": "groups[1].schedule"}


def test_a_scheduled_learning_rate_is_refused_where_its_step_size_is_beyond_float32() -> None:
    """The factor of Adam's first update is lr / (1 − β1)."""
    groups = (TWO[0], TWO[1].replace({"lr": 1e30}))
    config = make_config(SPEC, groups=groups, schedules=(None, Schedule.exponential(10.0)))
    with pytest.raises(
        InvalidRequestError, match=r"after 8 updates is 1e\+38, and float32 has step sizes up to 3.4e\+37"
    ):
        effective_groups(config, request(groups), (0, 8))


# --- recipes and scalars --------------------------------------------------------------------------------------


def test_the_sign_of_maximize_is_part_of_the_factor() -> None:
    assert gradient_factor(TWO[0], 0.25) == 0.25
    assert gradient_factor(TWO[0].replace({"maximize": True}), 0.25) == -0.25


def test_a_plain_session_has_a_plain_recipe() -> None:
    config = make_config(SPEC, measures=False)
    assert config.recipe(config.groups[0]) == Recipe(config.rule)


def test_a_recipe_does_what_the_session_asks_for() -> None:
    treatment = GradientTreatment(accumulation_steps=2, clip_grad_value=0.5, parameter_average_decay=0.75)
    config = make_config(SPEC, optimizer=AdamW(), treatment=treatment, precision=Precision.BFLOAT16)
    assert config.recipe(config.groups[0]) == Recipe(
        config.rule,
        Decay.BEFORE,
        accumulates=True,
        limits=True,
        averages=True,
        measures=True,
    )
    assert config.slots["exp_avg"] is config.precision is Precision.BFLOAT16


def test_no_decay_is_a_recipe_of_its_own() -> None:
    """0 times an infinite parameter would be NaN."""
    config = make_config(SPEC, optimizer=AdamW())
    assert config.recipe(config.groups[0].replace({"weight_decay": 0.0})).decay is Decay.NONE


def test_clipping_by_value_is_measured_even_where_the_session_measures_nothing() -> None:
    """The clipped norm is part of every result."""
    config = make_config(SPEC, treatment=GradientTreatment(clip_grad_value=1.0), measures=False)
    assert config.recipe(config.groups[0]).measures


def test_scalars_come_in_the_recipes_order() -> None:
    treatment = GradientTreatment(clip_grad_value=0.5, parameter_average_decay=0.75)
    config = make_config(SPEC, optimizer=AdamW(lr=0.5, weight_decay=0.25), treatment=treatment)
    hyper = config.groups[0].replace({"maximize": True})
    (segment,) = passes(config, [hyper], [CountedSegment(0, 4, 0, 7)], 0.125, [0.0625])
    named = dict(zip(segment.step.recipe.scalars, segment.step.scalars, strict=True))
    assert (named["factor"], named["clip"], named["limit"]) == (-0.125, 0.0625, 0.5)
    assert (named["decay_scalar"], named["average_rate"]) == (1 - 0.5 * 0.25, 0.25)
    assert segment.step.scalars[5:] == config.rule.scalars(hyper, 7)
    assert (segment.start, segment.end, segment.group, segment.step.seed) == (0, 4, 0, 7)


def test_each_segment_has_the_numbers_of_its_group_and_its_t() -> None:
    config = make_config(SPEC, groups=TWO)
    segments = [CountedSegment(0, 4, 0, 3), CountedSegment(256, 300, 1, 8)]
    first, second = passes(config, TWO, segments, 1.0, [0.5, 0.25])
    assert first.step.scalars == (1.0, 0.5, *config.rule.scalars(TWO[0], 3))
    assert second.step.scalars == (1.0, 0.25, *config.rule.scalars(TWO[1], 8))


class Done:
    """Work that is done, and its sums."""

    def __init__(self, *sums: float) -> None:
        self._sums = sums

    def wait(self) -> tuple[float, ...]:
        return self._sums


class Arrays:
    """The calls of an update, element by element: `(group, chunk element)` that stepped it; None for a mere read.

    Attributes:
        calls: of each element that was touched.
    """

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}

    def update(self, group: Any, start: int, gradient: Any, begin: int, end: int, out: Any) -> Done:
        for index in range(end - begin):
            assert start + index not in self.calls
            self.calls[start + index] = (group, begin + index)
            if out is not None:
                out[index] = start + index
        return Done(float(end - begin), 1.0)

    def read(self, slot: str, start: int, out: Any) -> Done:
        for index in range(len(out)):
            assert (slot, start + index not in self.calls) == ("param", True)
            self.calls[start + index] = None
            out[index] = start + index
        return Done()


EDGES = st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted)


@given(EDGES, st.integers(0, 60), st.integers(1, 60), st.integers(0, 9), st.booleans())
def test_an_update_steps_each_element_of_a_range_by_its_segment_and_reads_the_others(
    edges: list[int], low: int, count: int, before: int, replies: bool
) -> None:
    """Held against each element's own segment; `before` is the part of the chunk in front of the range."""
    high, offset = low + count, low - min(before, low)
    segments = [
        SegmentPass(start, end, group, group)  # type: ignore[arg-type]
        for group, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    arrays, out = Arrays(), np.full(count, -1) if replies else None
    update = Update(arrays, segments, len(segments))  # type: ignore[arg-type]
    work = update.apply("chunk", offset, low, high, out)  # type: ignore[arg-type]
    expected: dict[int, Any] = dict.fromkeys(range(low, high)) if replies else {}
    for start, end, group, _ in segments:
        expected |= {at: (group, at - offset) for at in range(max(start, low), min(end, high))}
    assert arrays.calls == expected
    assert out is None or out.tolist() == list(range(low, high))
    touched = [part for part in segments if max(part.start, low) < min(part.end, high)]
    assert len(work) >= len(touched)
    norms = [[max(min(part.end, high) - max(part.start, low), 0), 1] if part in touched else [] for part in segments]
    assert update.norms() == [[math.sqrt(value) for value in columns] for columns in norms]


def test_a_range_that_nobody_sent_goes_back_as_it_is() -> None:
    arrays, out = Arrays(), np.full(5, -1)
    update = Update(arrays, [SegmentPass(0, 20, 0, 0)], 1)  # type: ignore[arg-type]
    assert len(update.apply(None, 0, 3, 8, out)) == 1
    assert (arrays.calls, out.tolist()) == (dict.fromkeys(range(3, 8)), [3, 4, 5, 6, 7])
    assert update.norms() == [[]]
    assert update.apply(None, 0, 8, 9, None) == []


# --- trust ratios ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [LAMB(lr=0.5, weight_decay=0.125), LARS(lr=0.5, weight_decay=0.125)])
@pytest.mark.parametrize("cuts", [(), (2,), (1, 3, 7)])
def test_each_tensor_of_a_layerwise_rule_has_a_ratio_of_its_own(optimizer: Any, cuts: tuple[int, ...]) -> None:
    """However its gradient arrives: the norms are of the whole tensor."""
    specs = (TensorSpec("a", (5,)), TensorSpec("b", (4,)), TensorSpec("zero", (3,)))
    config = make_config(*specs, optimizer=optimizer)
    state = CpuEngine(threads=1, use_numba=False).allocate(config.slots, 12)
    params = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    params[9:] = 0.0
    gradient = np.random.default_rng(2).standard_normal(12).astype(np.float32)
    state.write("param", 0, params)
    room = MemoryBudget(100).reserve(1, "it")
    staged = StagedGradient(FLOAT32, config.active, state, room, unscale=1.0)
    edges = [0, *cuts, 12]
    for start, end in zip(edges, edges[1:], strict=False):
        staged.add(start, end - start, np.frombuffer(gradient[start:end].tobytes(), np.uint8))
    segments = TensorSteps(config, [0] * 3).segments(config.active)
    steps = trusted(passes(config, config.groups, segments, 1.0, [1.0]), config.groups, staged, state)
    hyper = config.groups[0]
    p, g = params.astype(np.float64), gradient.astype(np.float64)
    ratios = []
    for start, end in ((0, 5), (5, 9), (9, 12)):
        if isinstance(optimizer, LAMB):  # You et al., 2020, at t = 1: m / c1 = g and v / c2 = g²
            direction = g / (np.abs(g) + hyper.eps) + hyper.weight_decay * p
            norms = np.linalg.norm(p[start:end]), np.linalg.norm(direction[start:end])
        else:  # optax.lars: the trust ratio of g + λ·p
            norms = np.linalg.norm(p[start:end]), np.linalg.norm((g + hyper.weight_decay * p)[start:end])
        ratios.append(1.0 if 0.0 in norms else optimizer.trust_coefficient * norms[0] / norms[1])
    assert [segment.step.scalars[-1] for segment in steps] == pytest.approx(ratios, rel=1e-6)
    assert [(segment.start, segment.end) for segment in steps] == [(0, 5), (5, 9), (9, 12)]
    held = np.empty(12, np.float32)
    state.read("param", 0, held).wait()
    assert held.tobytes() == params.tobytes(), "measuring changes nothing"


def test_rules_that_are_not_layerwise_need_no_ratio() -> None:
    config = make_config(SPEC, optimizer=SGD(lr=0.5))
    assert config.rule.direction is None
    (segment,) = passes(config, config.groups, [CountedSegment(0, 4, 0, 1)], 1.0, [1.0])
    assert len(segment.step.scalars) == len(segment.step.recipe.scalars)
    assert math.prod(segment.step.scalars[:2]) == 1.0
