"""Observations by their size: each in the bucket of the least bound that is not below it."""

from __future__ import annotations

import itertools

import pytest

from stepwire_server.observability.histograms import SECONDS, Histogram


def test_an_observation_is_in_the_bucket_of_the_least_bound_above_it() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.0, 1.0, 1.5, 2.0, 4.0, 5.0, 5.5, 100.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2, 2]
    assert histogram.total == 119.0
    assert histogram.count == 8


def test_sums_add_buckets_and_totals() -> None:
    first, second = Histogram(), Histogram()
    first.observe(0.003)
    second.observe(0.003)
    second.observe(1e9)
    sum_ = Histogram.sum_of([first, second])
    assert sum_.counts[SECONDS.index(0.005)] == 2
    assert sum_.counts[-1] == 1
    assert sum_.total == pytest.approx(1e9 + 0.006)
    assert first.count == 1, "what is added stays as it is"


def test_bounds_ascend() -> None:
    assert all(low < high for low, high in itertools.pairwise(SECONDS))
