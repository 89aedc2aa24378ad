"""The config of a session, and the values that follow from it."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire.layout import TensorSpec
from stepwire.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Decay, Precision
from tests.server.configs import make_config


def test_an_order_is_fixed() -> None:
    request = StepRequest(1, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    assert request._replace(step=2) == StepRequest(2, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    with pytest.raises(AttributeError):
        request.step = 3  # type: ignore[misc]


def test_an_order_asks_for_nothing_that_is_not_said() -> None:
    request = StepRequest(1, 0, np.dtype(np.float32), np.dtype(np.float16), True, 10, ())
    assert (request.own_lr, request.loss_scale, request.missing) == ((), 1.0, frozenset())


def test_parameters_sums_and_averages_are_float32_however_moments_are_held() -> None:
    treatment = GradientTreatment(accumulation_steps=2, parameter_average_decay=0.5)
    config = make_config(TensorSpec("w", (5,)), treatment=treatment, precision=Precision.BFLOAT16)
    assert config.slots == {
        "param": Precision.FLOAT32,
        "exp_avg": Precision.BFLOAT16,
        "exp_avg_sq": Precision.BFLOAT16,
        "grad_accumulation": Precision.FLOAT32,
        "param_average": Precision.FLOAT32,
    }
    assert list(config.slots)[0] == "param"
    assert config.visible_slots == tuple(config.slots)


def test_an_eight_bit_slot_has_its_blocks_maxima_beside_it() -> None:
    config = make_config(TensorSpec("w", (5000,)), precision=Precision.INT8)
    assert config.visible_slots == ("param", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def test_small_tensors_keep_float32_neighbours_as_one_range() -> None:
    specs = [TensorSpec(name, (count,)) for name, count in zip("abcdef", (10, 0, 20, 4096, 4095, 5000), strict=True)]
    config = make_config(*specs, precision=Precision.INT8)
    assert [(tensor.offset, tensor.count) for tensor in config.layout.tensors] == [
        (0, 10),
        (10, 0),
        (10, 20),
        (256, 4096),
        (4352, 4095),
        (8448, 5000),
    ]
    eight, four = Precision.INT8, Precision.FLOAT32
    assert config.regions == ((0, 30, four), (256, 4352, eight), (4352, 8447, four), (8448, 13448, eight))
    assert config.slots["exp_avg"] == config.slots["exp_avg_sq"] == config.regions
    assert config.held_precisions == ({eight, four},)
    assert make_config(*specs).regions == ((0, 13221, four),)


def test_slots_in_one_precision_have_no_regions() -> None:
    for precision in Precision:
        config = make_config(TensorSpec("a", (5000,)), TensorSpec("b", (4096,)), precision=precision)
        assert config.slots["exp_avg"] is precision
    small = make_config(TensorSpec("a", (5,)), TensorSpec("b", (4095,)), precision=Precision.INT8)
    assert small.slots["exp_avg"] is Precision.FLOAT32
    assert "exp_avg_scale" in small.visible_slots, "the slots that are loaded do not depend on sizes"


def test_tensors_have_precisions_of_their_own() -> None:
    kinds = [("float32", 0), ("int8", 0), ("int8", 0), ("bfloat16", 1), ("float32", 2), ("float32", 2)]
    specs = [TensorSpec(f"t{i}", (5000,), group, False, kind) for i, (kind, group) in enumerate(kinds)]
    config = make_config(*specs, groups=(Adam().hyperparameters(),) * 3)
    assert config.regions == (
        (0, 5000, Precision.FLOAT32),
        (5120, 15240, Precision.INT8),
        (15360, 20360, Precision.BFLOAT16),
        (20480, 30480, Precision.FLOAT32),
    )
    assert config.held_precisions == (
        {Precision.FLOAT32, Precision.INT8},
        {Precision.BFLOAT16},
        {Precision.FLOAT32},
    )
    assert config.slots["param"] is Precision.FLOAT32
    assert config.visible_slots == ("param", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    without = make_config(*(spec for spec in specs if spec.state_precision != "int8"), groups=config.groups)
    assert without.visible_slots == ("param", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_a_momentum_buffer_is_kept_for_all_if_any_group_has_momentum(kind: type[Optimizer]) -> None:
    plain, moving = kind().hyperparameters(), kind(momentum=0.5).hyperparameters()  # type: ignore[call-arg]
    specs = (TensorSpec("a", (1,)), TensorSpec("b", (1,), 1))
    for groups, kept in (((plain, plain), False), ((plain, moving), True)):
        config = make_config(*specs, optimizer=kind(), groups=groups)
        assert config.momentum is kept
        assert ("momentum_buffer" in config.slots) is kept


def test_decay_acts_where_the_optimizer_says() -> None:
    spec = TensorSpec("w", (1,))
    assert make_config(spec, optimizer=Adam(weight_decay=0.5)).decay is Decay.GRADIENT
    assert make_config(spec, optimizer=AdamW()).decay is Decay.BEFORE
    assert make_config(spec, optimizer=AdamW(formula="decay_after")).decay is Decay.AFTER


def test_a_step_moves_all_but_the_frozen_and_the_missing() -> None:
    config = make_config(*(TensorSpec(name, (2,), frozen=name == "b") for name in "abcd"))
    assert config.active.indices == (0, 2, 3)
    assert config.without(frozenset({0, 1})).indices == (2, 3)
    assert config.without(frozenset()) is config.active
