"""Rows that stand for a product of parameters have every pair of values, and are the same in every process."""

from __future__ import annotations

import itertools

import pytest

from tests.support.pairwise import combinations, covering, missing, pairwise, spread

PARAMETERS = {
    "rule": "abcdefg",
    "decay": [0, 1, 2, None],
    "flag": [False, "yes"],
    "other": [False, "no"],
    "size": [8, 9],
}


def rare(row: dict) -> bool:
    """Forbid one pair."""
    return (row.get("rule"), row.get("decay")) != ("c", 2)


@pytest.mark.parametrize("allowed", [lambda row: True, rare])
@pytest.mark.parametrize("wholly", [[], [("flag", "other", "size")]])
def test_rows_have_every_pair_and_whole_groups(allowed, wholly) -> None:
    rows = pairwise(PARAMETERS, wholly, allowed)
    pairs = {
        frozenset(pair)
        for names in [*itertools.combinations(PARAMETERS, 2), *wholly]
        for pair in itertools.product(*([(name, value) for value in PARAMETERS[name]] for name in names))
        if allowed(dict(pair))
    }
    assert pairs == set(combinations(PARAMETERS, wholly, allowed))
    assert all(any(pair <= row.items() for row in rows) for pair in pairs)
    assert all(allowed(row) and list(row) == list(PARAMETERS) for row in rows)
    assert len(rows) <= 32 < 7 * 4 * 8


def test_rows_that_are_given_count() -> None:
    given = [{"rule": "a", "decay": 0, "flag": False, "other": False, "size": 8}]
    rows = pairwise(PARAMETERS, given=given)
    assert rows[0] == given[0]
    assert pairwise(PARAMETERS, given=rows) == rows


def test_rows_are_the_same_each_time() -> None:
    assert pairwise(PARAMETERS) == pairwise(PARAMETERS)


def test_missing_combinations_are_named() -> None:
    wanted = combinations({"x": [1, 2], "y": [3]})
    assert missing(wanted, [{"x": 1, "y": 3}]) == [frozenset({("x", 2), ("y", 3)})]


def test_a_further_parameter_meets_every_value() -> None:
    rows = pairwise(PARAMETERS)
    chosen = spread(rows, "uvw")
    for value in "uvw":
        items = {item for row, other in zip(rows, chosen, strict=True) if other == value for item in row.items()}
        assert items == {(name, each) for name, values in PARAMETERS.items() for each in values}


def test_few_rows_cover_some_combinations() -> None:
    rows = pairwise(PARAMETERS)
    wanted = combinations({name: PARAMETERS[name] for name in ("rule", "decay")})
    chosen = covering(rows, wanted)
    assert missing(wanted, chosen) == []
    assert len(chosen) == len(wanted) and all(row in rows for row in chosen)
    with pytest.raises(AssertionError, match="no row has"):
        covering(rows, [frozenset({("rule", "of no row")})])
