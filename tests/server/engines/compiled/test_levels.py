"""Levels of processors: which is whose."""

from __future__ import annotations

import pytest

from stepwire_server.engines.compiled.levels import LEVELS, level_of

NAMES = ["x86-64-v4", "x86-64-v3", "x86-64-v2"]


def features(*levels: int) -> dict[str, bool]:
    """What a processor has that has all of these levels and nothing else; 4 is the highest."""
    return {name: True for level in LEVELS if int(level.name[-1]) in levels for name in level.needs}


def test_levels_go_down_and_each_contains_the_next() -> None:
    assert [level.name for level in LEVELS] == NAMES
    assert LEVELS[0].needs > LEVELS[1].needs > LEVELS[2].needs
    assert all(level.features for level in LEVELS)


@pytest.mark.parametrize("level", [4, 3, 2])
def test_a_processor_has_the_highest_level_that_it_meets(level: int) -> None:
    found = level_of(features(level) | {"amx": True})
    assert found is not None
    assert found.name == f"x86-64-v{level}"


@pytest.mark.parametrize("missing", ["avx512vl", "avx2", "sse4.2"])
def test_what_is_missing_lowers_the_level(missing: str) -> None:
    found = level_of(features(4) | {missing: False})
    expected = {"avx512vl": "x86-64-v3", "avx2": "x86-64-v2", "sse4.2": None}[missing]
    assert (found and found.name) == expected


def test_other_architectures_have_none() -> None:
    assert level_of({"neon": True, "sve": True}) is None
