"""The exact sum of several gradients: held to fractions, whatever the order, cuts, threads, dtypes and kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire.wire.int8_blocks import INT8, decode_blocks, encode_blocks
from stepwire_server.engines import CpuEngine
from stepwire_server.engines.cpu.exact_sum import ERROR_BLOCK
from stepwire_server.engines.protocol import GRAIN

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ADVERSARIAL = st.one_of(
    FLOATS,
    st.sampled_from([0.0, -0.0, 1e8, -1e8, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, 2.0**-126, 16777215.0, 2.0**-24]),
    st.builds(lambda sign, power: sign * 2.0**power, st.sampled_from([-1, 1, 3, -5]), st.integers(-149, 125)),
)
FACTORS = st.sampled_from([1.0, 1.0, -1.0, 3.0, 0.1, 1.0 / 3.0, 0.0, 2.0**-60, 17.25, 1e-9])
DIVISORS = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, 0.1, 1.7, 1.0 / 3.0, 123456.789, 2.0**60])


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    engine = CpuEngine(threads=1, use_numba=request.param == "numba")
    yield engine
    engine.close()


def nearest(value: Fraction) -> float:
    """Round to float32, ties to even, by a search among neighbours."""
    if abs(value) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return math.copysign(math.inf, value)
    near = np.float32(min(max(float(value), -3.4028234e38), 3.4028234e38))
    with np.errstate(over="ignore"):
        around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    finite = [each for each in around if np.isfinite(each)]
    return float(min(finite, key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(np.uint32)) & 1)))


def expected(gradients: Sequence[np.ndarray], factors: Sequence[float], divisor: float) -> list[float]:
    """Return the rounded quotient of each element; products are Python's, and so float64."""
    return [
        nearest(sum(Fraction(float(x) * factor) for x, factor in zip(column, factors, strict=True)) / Fraction(divisor))
        for column in zip(*gradients, strict=True)
    ]


def mean_of(engine: CpuEngine, gradients: Sequence[np.ndarray], factors: Sequence[float], divisor: float) -> np.ndarray:
    """Add whole gradients, and divide."""
    size = len(gradients[0])
    total, buffer = engine.exact_sum(size), engine.staging(size).receive()
    for gradient, factor in zip(gradients, factors, strict=True):
        total.add(0, buffer.put(0, gradient), 0, size, factor)
    result = total.mean(divisor).copy()
    total.close()
    return result


def test_the_probe_gives_two_in_every_order(engine) -> None:
    orders = list(itertools.permutations([1e8, 1.0, -1e8, 1.0]))
    gradients = np.array(orders, np.float32).T.copy()
    assert mean_of(engine, list(gradients), [1.0] * 4, 1.0).tolist() == [2.0] * len(orders)


def test_small_numbers_survive_large_ones_in_every_order(engine) -> None:
    """Eight numbers from one end of float32 to the other leave the smallest; the orders are elements."""
    numbers = [3e38, 1e20, 7.0, 1e-45, 1e-20, -3e38, -1e20, -7.0, -1e-20]
    orders = [np.random.default_rng(seed).permutation(numbers) for seed in range(300)]
    gradients = np.array(orders, np.float32).T.copy()
    assert set(mean_of(engine, list(gradients), [1.0] * len(numbers), 1.0).tolist()) == {float(np.float32(1e-45))}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_mean_is_the_fraction_rounded_once_whatever_the_order(engine, data) -> None:
    workers, size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    gradients = [
        np.array(data.draw(st.lists(ADVERSARIAL, min_size=size, max_size=size)), np.float32) for _ in range(workers)
    ]
    factors = data.draw(st.lists(FACTORS, min_size=workers, max_size=workers))
    divisor = data.draw(DIVISORS)
    order = data.draw(st.permutations(range(workers)))
    got = mean_of(engine, [gradients[index] for index in order], [factors[index] for index in order], divisor)
    assert got.tolist() == expected(gradients, factors, divisor)
    again = mean_of(engine, gradients, factors, divisor)
    assert got.view(np.uint32).tolist() == again.view(np.uint32).tolist()


@pytest.mark.many
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10, 0.3])
@pytest.mark.parametrize("power", [0, 20, -126, -130, 100])
def test_middles_of_two_float32_go_to_even_and_others_to_their_side(engine, count, power) -> None:
    """A quotient that is a middle exactly, and totals just beside count · middle, in several gradients."""
    random = np.random.default_rng(200 + power)
    quantum = Fraction(2) ** max(power - 23, -149)
    middles = [(2 * int(random.integers(2**20, 2**21)) + 1) * quantum / 2 for _ in range(40)]
    gradients = np.zeros((8, 3 * len(middles)), np.float32)
    for column, (middle, side) in enumerate(itertools.product(middles, (-1, 0, 1))):
        rest, row = middle * Fraction(count), 0
        while rest and row < 7:
            gradients[row, column] = nearest(rest)
            rest, row = rest - Fraction(float(gradients[row, column])), row + 1
        gradients[7, column] = side * 1e-45
    for order in (range(8), reversed(range(8))):
        got = mean_of(engine, [gradients[row] for row in order], [1.0] * 8, count)
        assert got.tolist() == expected(list(gradients), [1.0] * 8, count)


def encoded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Encode in a wire dtype."""
    if dtype != INT8:
        with np.errstate(all="ignore"):
            return values.astype(dtype)
    blocks = np.empty(-(-len(values) // 256), INT8)
    encode_blocks(values, blocks)
    return blocks


@pytest.mark.many
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), INT8])
def test_cuts_change_nothing_in_any_dtype(engine, unaligned, dtype, data) -> None:
    size, workers = 300, 4
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    values = random.standard_normal((workers, size)) * np.exp2(random.integers(-14, 15, (workers, size)))
    payloads = [unaligned(encoded(row.astype(np.float32), dtype)) for row in values]
    gradients = [decode_blocks(each, size) if dtype == INT8 else each.astype(np.float32) for each in payloads]
    total, buffer = engine.exact_sum(size + 10), engine.staging(size).receive()
    chunks = [buffer.put(0, payload, size) for payload in payloads]
    ranges = []
    for worker in range(workers):
        edges = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=4))), size]
        ranges += [(worker, begin, end) for begin, end in itertools.pairwise(edges)]
    for worker, begin, end in data.draw(st.permutations(ranges)):
        total.add(3 + begin, chunks[worker], begin, end, 1.0)
    got = total.mean(3.0).tolist()
    assert got == [0.0] * 3 + expected(gradients, [1.0] * workers, 3.0) + [0.0] * 7


def spread(size: int, workers: int, seed: int = 0) -> list[np.ndarray]:
    """Return gradients of which one element in a thousand has numbers of all sizes."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((workers, size), dtype=np.float32)
    places = random.choice(size, size // 1000, replace=False)
    values[:, places] *= np.exp2(random.integers(-90, 90, (workers, len(places)))).astype(np.float32)
    return list(values)


@pytest.mark.parametrize("factor", [1.0, 0.7], ids=["few errors", "many errors"])
def test_threads_and_kernels_change_no_bit(factor) -> None:
    """Several blocks of errors, ranges that several threads have in common, and a start inside a block."""
    size = 5 * GRAIN + 777
    gradients, results = spread(size, 4), []
    for threads, use_numba, order in [(1, False, 1), (3, False, -1), (1, True, -1), (3, True, 1)]:
        if use_numba:
            pytest.importorskip("numba")
        engine = CpuEngine(threads, use_numba)
        total, buffer = engine.exact_sum(size + 5), engine.staging(size).receive()
        for gradient in gradients[::order]:
            total.add(5, buffer.put(0, gradient), 0, size, factor)
        assert total.nbytes > 8 * (size + 5)
        results.append(total.mean(1.3).copy())
        total.close()
        engine.close()
    for other in results[1:]:
        assert (other.view(np.uint32) == results[0].view(np.uint32)).all()
    some = np.random.default_rng(1).choice(size, 2000, replace=False)
    assert results[0][some + 5].tolist() == expected([each[some] for each in gradients], [factor] * 4, 1.3)


def test_nan_and_inf_stay_in_every_order(engine) -> None:
    columns = [(math.nan, 1.0, 2.0), (math.inf, 1.0, 1e-30), (math.inf, -math.inf, 1.0), (1e38, -math.inf, 1e-45)]
    want = [math.nan, math.inf, math.nan, -math.inf]
    seen = set()
    for order in itertools.permutations(range(3)):
        gradients = [np.array([column[index] for column in columns], np.float32) for index in order]
        got = mean_of(engine, gradients, [1.0, 1.0, 1.0], 3.0)
        assert np.array_equal(got, np.array(want, np.float32), equal_nan=True)
        seen.add(got.tobytes())
    assert len(seen) == 1


def test_a_round_leaves_nothing_for_the_next(engine) -> None:
    total, buffer = engine.exact_sum(4), engine.staging(4).receive()
    huge = buffer.put(0, np.array([1e30, math.nan, 1.0, 1.0], np.float32))
    tiny = buffer.put(0, np.array([1e-30, 1.0, 1.0, 1.0], np.float32))
    total.add(0, huge, 0, 4, 1.0)
    total.add(0, tiny, 0, 4, 1.0)
    assert total.nbytes == 2 * 4 * 8
    total.mean(1.0)
    total.clear()
    assert total.nbytes == 4 * 8
    total.add(1, tiny, 1, 3, 2.0)
    assert total.mean(4.0).tolist() == [0.0, 0.5, 0.5, 0.0]


def test_zero_keeps_its_sign_where_all_have_it(engine) -> None:
    gradients = [np.array([-0.0, -0.0, 1.0], np.float32), np.array([-0.0, 0.0, -1.0], np.float32)]
    for order in (1, -1):
        assert np.signbit(mean_of(engine, gradients[::order], [1.0, 1.0], 2.0)).tolist() == [True, False, False]


def test_memory_is_counted_and_given_back(engine) -> None:
    before = engine.statistics().allocated_bytes
    total = engine.exact_sum(1000)
    assert engine.statistics().allocated_bytes == before + 8000
    total.close()
    total.close()
    assert engine.statistics().allocated_bytes == before and total.nbytes == 0


def test_the_mean_lies_in_the_memory_of_the_sum(engine) -> None:
    """Long enough that quotients are written over totals many times."""
    size = 3 * GRAIN + 5
    gradient = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    total = engine.exact_sum(size)
    total.add(0, engine.staging(size).receive().put(0, gradient), 0, size, 6.0)
    bytes_before = total.nbytes
    mean = total.mean(6.0)
    assert (mean == gradient).all() and total.nbytes == bytes_before


def test_too_large_a_sum_is_refused(engine) -> None:
    with pytest.raises(ResourceExhaustedError, match="no memory to aggregate"):
        engine.exact_sum(1 << 58)


def test_kernels_are_compiled_ahead(engine) -> None:
    engine.prepare_sum(np.dtype(np.float32))


def test_staging_sums_squares_without_slots(engine) -> None:
    state = engine.staging(3)
    chunk = state.receive().put(0, np.array([1.0, 2.0, 3.0], np.float32))
    assert state.sum_of_squares(chunk, 0, 3, 2.0).wait() == 56.0
    assert state.fetch(chunk, 1, 3, 1.0).tolist() == [2.0, 3.0]
    assert state.nbytes == 0 and ERROR_BLOCK <= GRAIN
