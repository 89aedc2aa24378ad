"""Norms of one gradient, and the factors of clipping each group by its own and all by the global one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.gradient_treatment import ClipFormula
from stepwire.optimizers.norms import GradientNorms, clip_coefficient, gradient_norms

SQUARES = st.lists(st.just(0.0) | st.floats(1e-12, 1e12), min_size=1, max_size=5)


def never(groups: Sequence[int]) -> Fraction:
    raise AssertionError("the sum is not in doubt")


def exactly(squared: Sequence[float]) -> object:
    return lambda groups: sum((Fraction(squared[group]) for group in groups), Fraction(0))


def test_a_gradient_that_is_not_clipped_has_its_norms_alone() -> None:
    norms = gradient_norms([9.0, 16.0], never, None, (None, None), "torch")
    assert norms == GradientNorms((3.0, 4.0), 5.0, (1.0, 1.0), 1.0, left=5.0)
    assert norms.clipped() == (3.0, 4.0)


def test_the_global_norm_scales_all_groups_alike() -> None:
    norms = gradient_norms([9.0, 16.0], never, 2.5, (None, None), "optax")
    assert norms == GradientNorms((3.0, 4.0), 5.0, (0.5, 0.5), 0.5, left=5.0)
    assert norms.clipped() == (1.5, 2.0)


def test_a_groups_own_bound_is_its_own() -> None:
    norms = gradient_norms([9.0, 16.0], never, None, (None, 1.0), "optax")
    assert norms == GradientNorms((3.0, 4.0), 5.0, (1.0, 0.25), 1.0, left=math.hypot(3.0, 1.0))
    assert norms.clipped() == (3.0, 1.0)


def test_the_global_norm_is_of_what_the_groups_own_bounds_left() -> None:
    """The second group's 12 falls to 4, so 5 is left to be halved, and not the 12.37 before."""
    norms = gradient_norms([9.0, 144.0], never, 2.5, (None, 4.0), "optax")
    assert norms.total == float(np.float32(math.sqrt(153.0)))
    assert norms.coefficient == 0.5
    assert norms.coefficients == (0.5, 4.0 / 12.0 * 0.5)
    assert math.hypot(*norms.clipped()) == pytest.approx(2.5, rel=1e-15)


@given(st.floats(1e-12, 1e12), st.lists(st.floats(0.0, 1.0), max_size=3), st.floats(1e-3, 1e3))
def test_how_tensors_are_grouped_changes_no_bit_of_what_is_left(whole: float, cuts: list[float], bound: float) -> None:
    edges = [Fraction(0), *sorted(map(Fraction, cuts)), Fraction(1)]
    exact = [Fraction(whole) * (high - low) for low, high in itertools.pairwise(edges)]
    alone = gradient_norms([whole], lambda groups: Fraction(whole), bound, (None,), "torch")
    many = gradient_norms(
        [float(part) for part in exact],
        lambda groups: sum((exact[group] for group in groups), Fraction(0)),
        bound,
        (None,) * len(exact),
        "torch",
    )
    assert (many.total, many.coefficient, many.left) == (alone.total, alone.coefficient, alone.left)


@given(SQUARES, st.none() | st.floats(1e-3, 1e3), st.data(), st.sampled_from(get_args(ClipFormula)))
def test_what_is_left_is_within_every_bound(
    squared: list[float], bound: float | None, data: st.DataObject, formula: ClipFormula
) -> None:
    limits = data.draw(st.tuples(*[st.none() | st.floats(1e-3, 1e3)] * len(squared)))
    norms = gradient_norms(squared, exactly(squared), bound, limits, formula)  # type: ignore[arg-type]
    assert norms.groups == tuple(float(np.float32(math.sqrt(square))) for square in squared)
    clipped = norms.clipped()
    for norm, left, limit in zip(norms.groups, clipped, limits, strict=True):
        assert left <= min(norm, math.inf if limit is None else limit) * (1 + 1e-12)
    if bound is not None:
        assert math.hypot(*clipped) <= bound * (1 + 1e-6)


@given(SQUARES)
def test_norms_are_rounded_to_float32(squared: list[float]) -> None:
    norms = gradient_norms(squared, exactly(squared), None, (None,) * len(squared), "torch")  # type: ignore[arg-type]
    assert all(norm == float(np.float32(norm)) for norm in (*norms.groups, norms.total))


def test_where_rounding_is_in_doubt_the_exact_sum_decides() -> None:
    """1 + 2⁻²⁴ lies half-way between two float32: a float64 sum cannot tell on which side the truth is."""
    half = (Fraction(1) + Fraction(1, 2**24)) ** 2
    asked: list[tuple[int, ...]] = []
    for difference, expected in ((-1, 1.0), (0, 1.0), (1, 1.0 + 2.0**-23)):

        def exact(groups: Sequence[int], difference: int = difference) -> Fraction:
            asked.append(tuple(groups))
            return half + Fraction(difference, 2**80)

        norms = gradient_norms([float(half)], exact, None, (None,), "torch")
        assert (norms.total, norms.groups) == (expected, (expected,))
    assert asked == [(0,)] * 3


@pytest.mark.parametrize("formula", get_args(ClipFormula))
def test_the_formula_is_that_of_the_session(formula: ClipFormula) -> None:
    norms = gradient_norms([9.0, 16.0], never, 2.0, (None, None), formula)
    assert norms.coefficient == clip_coefficient(5.0, 2.0, formula)
    own = gradient_norms([9.0, 16.0], never, None, (1.0, None), formula)
    assert own.coefficients == (clip_coefficient(3.0, 1.0, formula), 1.0)


def test_what_is_not_finite_stays_so() -> None:
    norms = gradient_norms([math.inf, 4.0], never, 1.0, (None, None), "torch")
    assert (norms.groups, norms.total, norms.coefficient) == ((math.inf, 2.0), math.inf, 0.0)
    assert math.isnan(gradient_norms([math.nan], never, 1.0, (None,), "keras").coefficient)
