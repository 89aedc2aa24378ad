"""Networks of comparators: a fixed sequence of pairs that sorts any values, and so has no branch.

Source: Batcher 1968, "Sorting Networks and their Applications", odd-even merge sort; for up to 8 values no network is
known to have fewer comparators.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from stepwire_server.engines.protocol import HostArray

__all__ = ["network"]


@functools.cache
def network(count: int, low: int, high: int) -> HostArray:
    """Return the comparators that bring the values of ranks `[low, high)`, of `count` in all, to those places.

    Args:
        count: the number of values.
        low: the first rank that is needed; 0 is that of the smallest value.
        high: one past the last rank that is needed.

    Returns:
        The pairs of places, in order, `(n, 2) intp`; the smaller value goes to the first place of a pair.
    """
    needed, pairs = set(range(low, high)), []
    for pair in reversed([*_odd_even_merge_sort(count)]):
        if needed & {*pair}:
            needed |= {*pair}
            pairs.append(pair)
    return np.array(pairs[::-1], np.intp).reshape(-1, 2)


def _odd_even_merge_sort(count: int) -> Iterator[tuple[int, int]]:
    merged = 1
    while merged < count:
        distance = merged
        while distance:
            for low in range(distance % merged, count - distance, 2 * distance):
                for place in range(low, min(low + distance, count - distance)):
                    if place // (2 * merged) == (place + distance) // (2 * merged):
                        yield place, place + distance
            distance //= 2
        merged *= 2
