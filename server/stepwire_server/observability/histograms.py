"""Histograms of one writer, in plain lists: an observation is a bisection and two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["SECONDS", "Histogram"]

SECONDS: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025),
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
)
"""Upper bounds of the buckets of times: from a step over shared memory to a checkpoint of a large model."""


class Histogram:
    """Counts of observations by their size. One thread at a time observes; any thread may read.

    Attributes:
        bounds: the upper bounds of the buckets, ascending, but for the last one, which has none.
        counts: the observations in each bucket, `(len(bounds) + 1,)`.
        total: the sum of all observations.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """Start without observations."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count an observation; a value that is a bound belongs to the bucket below."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """The number of all observations."""
        return sum(self.counts)

    @classmethod
    def sum_of(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Return the sum of histograms with the usual bounds, which may be observing."""
        result, found = cls(), list(histograms)
        result.counts = list(map(sum, zip(result.counts, *(histogram.counts for histogram in found), strict=True)))
        result.total = sum(histogram.total for histogram in found)
        return result
