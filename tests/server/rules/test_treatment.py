"""What happens around a rule: NaN goes through, and a factor of one changes nothing."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire_server.rules import treatment
from stepwire_server.rules.treatment import added, averaged, decayed, drawn, lessened, limited, moved, scaled

FLOATS = st.floats(width=32)
ODD = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, 1.5], np.float32)


def bits(values: np.ndarray) -> list[int]:
    return np.asarray(values, np.float32).view(np.uint32).tolist()


def test_a_factor_of_one_changes_no_bit() -> None:
    assert bits(scaled(ODD, np.float32(1.0))) == bits(ODD)


@given(FLOATS, FLOATS)
def test_scaling_and_adding_are_one_rounding(x: float, y: float) -> None:
    with np.errstate(all="ignore"):
        a, b = np.float32(x), np.float32(y)
        np.testing.assert_equal(scaled(a, b), a * b)
        np.testing.assert_equal(added(a, b), b + a)


@given(FLOATS, st.floats(0.0, width=32, exclude_min=True, allow_infinity=False))
def test_limited_bounds_the_magnitude_and_keeps_nan(x: float, limit: float) -> None:
    got = limited(np.float32(x), np.float32(limit))
    assert np.isnan(got) if np.isnan(x) else got == max(-limit, min(x, limit))
    assert got.dtype == np.float32


@pytest.mark.parametrize("limit", [1.0, 3.4e38, 1e-45])
def test_limited_keeps_what_is_within(limit) -> None:
    limit = np.float32(limit)
    inside = ODD[~(abs(ODD) > limit)]
    assert bits(limited(inside, limit)) == bits(inside)
    assert np.isnan(limited(ODD, limit)).tolist() == np.isnan(ODD).tolist()
    assert limited(np.array([np.inf, -np.inf], np.float32), limit).tolist() == [limit, -limit]


@pytest.mark.parametrize("name", treatment.__all__)
def test_nan_passes_through_any_argument_but_numbers(name) -> None:
    function = getattr(treatment, name)
    names = list(inspect.signature(function).parameters)
    arrays = [place for place, name in enumerate(names) if name in ("x", "g", "accumulated", "p", "e", "way")]
    assert arrays
    for place in arrays:
        values = [np.float32(0.5)] * len(names)
        values[place] = np.float32(np.nan)
        assert np.isnan(function(*values))


def test_decay_is_added_to_the_gradient() -> None:
    assert decayed(2.0, -8.0, 0.25) == 0.0
    assert np.isnan(decayed(np.float32(1.0), np.float32(np.nan), np.float32(0.0)))


@pytest.mark.parametrize(
    ("lost", "factor", "apart"), [(1e-9, 0, 0), (3e-8, 2, 0), (7e-8, 2, 2), (1e-5, 252, 252), (0.25, 6 << 20, 6 << 20)]
)
def test_forms_of_decoupled_decay_differ_where_little_is_lost(lost, factor, apart) -> None:
    """In units of 2⁻²⁴, half of what 1.5 can change by: a factor is rounded itself, and a difference once."""
    lost, p, unit = np.float32(lost), np.float32(1.5), 2.0**-24
    assert (p - scaled(p, np.float32(1.0 - float(lost)))) / unit == factor
    assert (p - lessened(p, lost)) / unit == apart
    assert moved(p, drawn(p, lost)) == lessened(p, lost)
    assert drawn(p, lost) == -lost * p


def test_an_average_moves_by_its_rate() -> None:
    assert averaged(4.0, 8.0, 0.25) == 5.0
    assert averaged(4.0, 8.0, 0.0) == 4.0
    assert averaged(4.0, 8.0, 1.0) == 8.0
