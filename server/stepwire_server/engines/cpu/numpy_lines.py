"""The kernel that sums columns of lines exactly, where Numba is missing; `CpuKernels.exact` has its arguments.

Sums of a few numbers are added together, with the error of each sum, and the errors likewise (Knuth's TwoSum). Sums of
more numbers, and those that even so have a rest, are added as integers would be (`math.fsum`). `math.fsum` holds the
interpreter's lock. So it gets some numbers at a time, and makes a few of them whose sum is the same.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from stepwire_server.engines.exact_scalars import two_sum
from stepwire_server.engines.protocol import HostArray

__all__ = ["few_with_the_sum_of", "sum_lines"]

_BATCH: Final = 1 << 20
"""The places that are added together at a time."""

_MOST_TOGETHER: Final = 32
"""The numbers of one place that are added in step with those of others."""

_AT_ONCE: Final = 8192
"""The numbers that `math.fsum` gets at a time: it needs less than a millisecond for them."""


def sum_lines(*arguments: Any) -> None:
    """Sum columns of lines; see `CpuKernels.exact`."""
    flat, width, firsts, counts, columns, totals, inexact = arguments
    numbers = flat.reshape(-1, width)
    together = counts <= _MOST_TOGETHER
    left, chosen = [np.flatnonzero(~together)], np.flatnonzero(together)
    for few in np.array_split(chosen, -(-len(chosen) // _BATCH)) if len(chosen) else []:
        totals[few], inexact[few], is_known = _two_sums(numbers, firsts[few], counts[few], columns[few])
        left.append(few[~is_known])
    for place in np.concatenate(left).tolist():
        found = numbers[firsts[place] : firsts[place] + counts[place], columns[place]]
        totals[place], inexact[place] = _odd_sum(few_with_the_sum_of(found))


def few_with_the_sum_of(numbers: HostArray) -> list[float]:
    """Return a few numbers whose exact sum is that of some finite ones, `(n,) float64`."""
    while len(numbers) > _AT_ONCE:
        parts = (numbers[low : low + _AT_ONCE].tolist() for low in range(0, len(numbers), _AT_ONCE))
        numbers = np.array([number for part in parts for number in _expansion(part)])
    found: list[float] = numbers.tolist()
    return found


def _expansion(numbers: list[float]) -> list[float]:
    """Return the sum of some numbers, the sum of what that leaves, and so on, until nothing is left."""
    found: list[float] = []
    while (rest := math.fsum([*numbers, *(-each for each in found)])) != 0.0:
        found.append(rest)
    return found


def _odd_sum(numbers: list[float]) -> tuple[float, bool]:
    """Return the sum of finite numbers, rounded to odd, and tell whether that is another number."""
    total = math.fsum(numbers)
    rest = math.fsum([*numbers, -total])
    if rest and not np.float64(total).view(np.int64) & 1:
        return math.nextafter(total, math.copysign(math.inf, rest)), True
    return total, bool(rest)


def _two_sums(
    numbers: HostArray, firsts: HostArray, counts: HostArray, columns: HostArray
) -> tuple[HostArray, HostArray, HostArray]:
    """Add up to `_MOST_TOGETHER` numbers of each element, with two levels of errors.

    Returns:
        The sums rounded to odd, whether each is another number, and whether it is known: the errors had no rest.
    """
    total, error, rest = (np.zeros(len(firsts)) for _ in range(3))
    is_known = np.ones(len(firsts), bool)
    for turn in range(int(counts.max())):
        here = np.flatnonzero(counts > turn)
        total[here], new = two_sum(total[here], numbers[firsts[here] + turn, columns[here]])
        error[here], new = two_sum(error[here], new)
        rest[here], new = two_sum(rest[here], new)
        is_known[here] &= new == 0.0
    for _ in range(3):  # until each is below half a unit of the one above
        error, rest = two_sum(error, rest)
        total, error = two_sum(total, error)
    error, rest = two_sum(error, rest)
    is_known &= two_sum(total, error)[1] == error
    moved = (error != 0.0) & (total.view(np.int64) & 1 == 0)
    odd = np.where(moved, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd, error != 0.0, is_known
