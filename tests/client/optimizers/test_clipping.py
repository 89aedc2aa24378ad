"""Clipping by norm: each framework's own formula, written out, and the frameworks themselves where there are any."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.gradient_treatment import ClipFormula
from stepwire.optimizers.norms import clip_coefficient

BOUNDS = st.floats(1e-6, 1e6)
NORMS = st.just(0.0) | st.floats(1e-9, 1e9)


def torchs(norm: float, bound: float) -> float:
    """`torch.nn.utils.clip_grads_with_norm_`: `clip_coef = max_norm / (total_norm + 1e-6)`, clamped to 1."""
    return min(bound / (norm + 1e-6), 1.0)


def optaxs(norm: float, bound: float) -> float:
    """`optax.clip_by_global_norm`: `select(g_norm < max_norm, t, (t / g_norm) * max_norm)`."""
    return 1.0 if norm < bound else bound / norm


def kerass(norm: float, bound: float) -> float:
    """`keras.src.optimizers.clip_by_global_norm`: `scale = clip_norm * minimum(1 / use_norm, 1 / clip_norm)`."""
    return bound * min(math.inf if norm == 0.0 else 1.0 / norm, 1.0 / bound)


WRITTEN_OUT: dict[ClipFormula, Any] = {"torch": torchs, "optax": optaxs, "keras": kerass}


@given(NORMS, BOUNDS, st.sampled_from(get_args(ClipFormula)))
def test_each_formula_is_its_frameworks(norm: float, bound: float, formula: ClipFormula) -> None:
    assert clip_coefficient(norm, bound, formula) == WRITTEN_OUT[formula](norm, bound)


@given(NORMS, BOUNDS, st.sampled_from(get_args(ClipFormula)))
def test_what_is_left_is_within_the_bound(norm: float, bound: float, formula: ClipFormula) -> None:
    assert norm * clip_coefficient(norm, bound, formula) <= bound * (1 + 1e-15)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (0.0, {"torch": 1.0, "optax": 1.0, "keras": 1.0}),
        (1.0, {"torch": 1.0, "optax": 1.0, "keras": 1.0}),
        (2.0, {"torch": 2.0 / 2.000001, "optax": 1.0, "keras": 1.0}),
        (8.0, {"torch": 2.0 / 8.000001, "optax": 0.25, "keras": 0.25}),
        (math.inf, {"torch": 0.0, "optax": 0.0, "keras": 0.0}),
    ],
)
def test_the_formulas_differ_at_the_bound(norm: float, expected: dict[ClipFormula, float]) -> None:
    assert {formula: clip_coefficient(norm, 2.0, formula) for formula in expected} == expected


@pytest.mark.parametrize("formula", get_args(ClipFormula))
def test_a_norm_that_is_nan_spoils_everything_as_it_does_in_all_three(formula: ClipFormula) -> None:
    assert math.isnan(clip_coefficient(math.nan, 1.0, formula))


GRADIENTS = [np.float32([3.0, 4.0]), np.float32([[12.0], [84.0]]), np.float32([0.5])]
NORM = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in GRADIENTS))


@pytest.mark.parametrize("bound", [0.1, 1.0, 85.0, 86.0, 1e4])
def test_torch_itself_agrees(bound: float) -> None:
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in GRADIENTS]
    for parameter, gradient in zip(parameters, GRADIENTS, strict=True):
        parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(parameters, bound)
    factor = clip_coefficient(NORM, bound, "torch")
    for parameter, gradient in zip(parameters, GRADIENTS, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), gradient * factor, rtol=3e-7)


@pytest.mark.parametrize("bound", [0.1, 1.0, 85.0, 86.0, 1e4])
def test_optax_itself_agrees(bound: float) -> None:
    optax = pytest.importorskip("optax")
    clip = optax.clip_by_global_norm(bound)
    clipped, _ = clip.update(GRADIENTS, clip.init(GRADIENTS))
    factor = clip_coefficient(NORM, bound, "optax")
    for got, gradient in zip(clipped, GRADIENTS, strict=True):
        np.testing.assert_allclose(got, gradient * factor, rtol=3e-7)
