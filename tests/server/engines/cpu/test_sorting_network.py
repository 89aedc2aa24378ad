"""Networks sort whatever comes: by the 0-1 principle, all values if all zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.engines.cpu.sorting_network import network


def applied(pairs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Apply comparators to each row of values."""
    values = values.copy()
    for first, second in pairs.tolist():
        values[:, [first, second]] = np.sort(values[:, [first, second]], axis=1)
    return values


@pytest.mark.parametrize("count", range(1, 13))
def test_every_zero_and_one_reaches_its_rank(count) -> None:
    inputs = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    want = np.sort(inputs, axis=1)
    assert (applied(network(count, 0, count), inputs) == want).all()
    for low in range(count):
        for high in {low + 1, count - low, count} - set(range(low + 1)):
            got = applied(network(count, low, high), inputs)
            assert (got[:, low:high] == want[:, low:high]).all(), (low, high)


@pytest.mark.parametrize("count", [16, 23, 32, 64])
def test_many_values_are_sorted(count) -> None:
    inputs = np.random.default_rng(count).integers(0, 20, (500, count))
    assert (applied(network(count, 0, count), inputs) == np.sort(inputs, axis=1)).all()


def test_comparators_that_nobody_needs_are_left_out() -> None:
    assert [len(network(count, 0, count)) for count in (1, 2, 4, 8)] == [0, 1, 5, 19]
    assert len(network(8, 0, 1)) == 7
    assert len(network(9, 4, 5)) < len(network(9, 0, 9))
