"""Dynamic loss scaling: GradScaler's rule, and GradScaler itself where torch is installed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire_server.rules.loss_scale import LossScale, after_step

SCALING = LossScaling(initial_scale=1024.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
LARGEST, SMALLEST = 1e37, 1e-37


def scales(scaling: LossScaling, steps: list[bool]) -> list[LossScale]:
    now, seen = LossScale(scaling.initial_scale), []
    for finite in steps:
        now = after_step(now, scaling, finite=finite)
        seen.append(now)
    return seen


def test_it_grows_after_enough_clean_steps_and_falls_at_once() -> None:
    assert scales(SCALING, [True, True, True, False, True, False, False, True, True]) == [
        LossScale(1024.0, 1),
        LossScale(3072.0, 0),
        LossScale(3072.0, 1),
        LossScale(768.0, 0),
        LossScale(768.0, 1),
        LossScale(192.0, 0),
        LossScale(48.0, 0),
        LossScale(48.0, 1),
        LossScale(144.0, 0),
    ]


def test_an_interval_of_one_grows_every_step() -> None:
    scaling = LossScaling(initial_scale=1.0, growth_interval=1)
    assert scales(scaling, [True] * 3) == [LossScale(2.0), LossScale(4.0), LossScale(8.0)]


def test_it_never_grows_beyond_float32_and_counts_on_from_there() -> None:
    scaling = LossScaling(initial_scale=2.0**127, growth_interval=2)
    assert scales(scaling, [True] * 3) == [LossScale(2.0**127, 1), LossScale(2.0**127, 0), LossScale(2.0**127, 1)]


def test_it_never_falls_out_of_float32s_normal_numbers() -> None:
    """Its reciprocal is what gradients are multiplied by, in float32."""
    scaling = LossScaling(initial_scale=SMALLEST * 1.5)
    assert scales(scaling, [False, False]) == [LossScale(SMALLEST), LossScale(SMALLEST)]
    assert np.isfinite(np.float32(1.0 / SMALLEST))


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 5),
    st.floats(SMALLEST, LARGEST),
    st.floats(1.0, 1e9, exclude_min=True),
    st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
)
def test_whatever_happens_the_scale_is_a_normal_float32_and_the_count_below_the_interval(
    steps: list[bool], interval: int, scale: float, growth: float, backoff: float
) -> None:
    scaling = LossScaling(initial_scale=scale, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    for now in scales(scaling, steps):
        assert SMALLEST <= now.scale <= LARGEST
        assert 0 <= now.clean_steps < interval


@pytest.mark.parametrize("seed", range(4))
def test_gradscaler_itself_agrees(seed: int) -> None:
    torch: Any = pytest.importorskip("torch")
    generator = np.random.default_rng(seed)
    scaling = LossScaling(initial_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scaling.initial_scale, growth_factor=2.0, backoff_factor=0.5, growth_interval=3
    )
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler.scale(torch.zeros(1))  # makes the scale
    now = LossScale(scaling.initial_scale)
    for _ in range(60):
        finite = bool(generator.random() < 0.75)
        parameter.grad = torch.tensor([1.0, 1.0 if finite else float("inf")])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaler.step(optimizer)
            scaler.update()
        now = after_step(now, scaling, finite=finite)
        assert (scaler.get_scale(), int(scaler._get_growth_tracker())) == (now.scale, now.clean_steps)
