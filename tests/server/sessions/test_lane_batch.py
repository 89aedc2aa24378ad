"""The number of steps that are computed ahead for a compiled lane."""

from __future__ import annotations

import pytest

from stepwire_server.sessions.lane_batch import steps_ahead


@pytest.mark.parametrize(
    ("asked", "computed", "made", "expected"),
    [
        (128, 128, 128, 128),
        (64, 64, 64, 128),
        (64, 3, 3, 128),  # a number would have had one more digit
        (128, 128, 127, 128),
        (128, 128, 20, 40),
        (128, 128, 0, 8),
        (8, 8, 1, 8),
        (8, 8, 8, 16),
    ],
)
def test_grants_that_end_early_are_followed_by_shorter_ones(
    asked: int, computed: int, made: int, expected: int
) -> None:
    assert steps_ahead(asked, computed, made) == expected
