"""What a session was created with, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire.layout import TensorSpec
from stepwire.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop
from stepwire.treatment import GradientTreatment
from stepwire_server.order import StepOrder
from stepwire_server.rules import Decay, Precision
from tests.server.plans import make_plan


def test_an_order_is_fixed() -> None:
    order = StepOrder(1, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    assert order._replace(step=2) == StepOrder(2, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    with pytest.raises(AttributeError):
        order.step = 3  # type: ignore[misc]


def test_an_order_asks_for_nothing_that_is_not_said() -> None:
    order = StepOrder(1, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    assert (order.own_lr, order.loss_scale, order.missing) == ((), 1.0, frozenset())


def test_parameters_sums_and_averages_are_float32_however_moments_are_held() -> None:
    treatment = GradientTreatment(accumulation_steps=2, parameter_average_decay=0.5)
    plan = make_plan(TensorSpec("w", (5,)), treatment=treatment, precision=Precision.BFLOAT16)
    assert plan.slots == {
        "param": Precision.FLOAT32,
        "exp_avg": Precision.BFLOAT16,
        "exp_avg_sq": Precision.BFLOAT16,
        "grad_accumulation": Precision.FLOAT32,
        "param_average": Precision.FLOAT32,
    }
    assert list(plan.slots)[0] == "param"
    assert plan.visible_slots == tuple(plan.slots)


def test_an_eight_bit_slot_has_its_blocks_maxima_beside_it() -> None:
    plan = make_plan(TensorSpec("w", (5000,)), precision=Precision.INT8)
    assert plan.visible_slots == ("param", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def test_small_tensors_keep_float32_neighbours_as_one_range() -> None:
    specs = [TensorSpec(name, (count,)) for name, count in zip("abcdef", (10, 0, 20, 4096, 4095, 5000), strict=True)]
    plan = make_plan(*specs, precision=Precision.INT8)
    assert [(tensor.offset, tensor.count) for tensor in plan.layout.tensors] == [
        (0, 10),
        (10, 0),
        (10, 20),
        (256, 4096),
        (4352, 4095),
        (8448, 5000),
    ]
    assert plan.kept == ((0, 30), (4352, 8447))
    assert make_plan(*specs).kept == ()


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_a_momentum_buffer_is_kept_for_all_if_any_group_has_momentum(kind: type[Optimizer]) -> None:
    plain, moving = kind().hyperparameters(), kind(momentum=0.5).hyperparameters()  # type: ignore[call-arg]
    specs = (TensorSpec("a", (1,)), TensorSpec("b", (1,), 1))
    for groups, kept in (((plain, plain), False), ((plain, moving), True)):
        plan = make_plan(*specs, optimizer=kind(), groups=groups)
        assert plan.momentum is kept
        assert ("momentum_buffer" in plan.slots) is kept


def test_decay_acts_where_the_optimizer_says() -> None:
    spec = TensorSpec("w", (1,))
    assert make_plan(spec, optimizer=Adam(weight_decay=0.5)).decay is Decay.GRADIENT
    assert make_plan(spec, optimizer=AdamW()).decay is Decay.BEFORE
    assert make_plan(spec, optimizer=AdamW(formula="decay_after")).decay is Decay.AFTER


def test_a_step_moves_all_but_the_frozen_and_the_missing() -> None:
    plan = make_plan(*(TensorSpec(name, (2,), frozen=name == "b") for name in "abcd"))
    assert plan.active.indices == (0, 2, 3)
    assert plan.without(frozenset({0, 1})).indices == (2, 3)
    assert plan.without(frozenset()) is plan.active
