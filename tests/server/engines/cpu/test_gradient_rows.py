"""Means of rows that bad rows cannot move far: held to sorted fractions, in every order of rows."""

from __future__ import annotations

from fractions import Fraction

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


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    engine = CpuEngine(threads=2, use_numba=request.param == "numba")
    yield engine
    engine.close()


def rows_of(engine: CpuEngine, gradients: np.ndarray):
    """Write gradients, `(n, size)`, into rows."""
    count, size = gradients.shape
    rows, buffer = engine.gradient_rows(size, count), engine.staging(size).receive()
    for index, gradient in enumerate(gradients):
        rows.write(index, 0, buffer.put(0, gradient), 0, size, 1.0)
    return rows


def quotient(values: np.ndarray) -> float:
    """Return the mean of float32 values, rounded to float32 by way of longer arithmetic than any middle needs."""
    exact = sum(map(Fraction, values.tolist()), Fraction(0)) / len(values)
    near = np.float32(float(exact))
    with np.errstate(over="ignore"):
        around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    finite = [each for each in around if np.isfinite(each)]
    return float(min(finite, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1)))


NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, 3e38, -3e38, 1e-45]),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranked_means_are_those_of_sorted_fractions_in_every_order(engine, data) -> None:
    count, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    drawn = st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=count, max_size=count)
    gradients = np.array(data.draw(drawn), np.float32)
    low = data.draw(st.integers(0, count - 1))
    high = data.draw(st.integers(low + 1, count))
    got = rows_of(engine, gradients).ranked_mean(count, low, high)
    ranked = np.sort(gradients, axis=0)[low:high]
    assert got.tolist() == [quotient(column) for column in ranked.T]
    again = rows_of(engine, gradients[data.draw(st.permutations(range(count)))]).ranked_mean(count, low, high)
    assert got.tobytes() == again.tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_scaled_means_round_products_and_then_the_mean(engine, data) -> None:
    count, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    moderate = st.floats(-(2.0**60), 2.0**60, width=32)
    drawn = st.lists(st.lists(moderate, min_size=size, max_size=size), min_size=count, max_size=count)
    gradients = np.array(data.draw(drawn), np.float32)
    factors = data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.1, 0.7]), min_size=count, max_size=count))
    products = gradients * np.array(factors, np.float32)[:, None]
    got = rows_of(engine, gradients).scaled_mean(factors)
    assert got.tolist() == [quotient(column) for column in products.T]


def test_threads_and_kernels_change_no_bit() -> None:
    """Numbers of all sizes, so that sums have errors; several blocks and ranges of threads, and an odd end."""
    size, results = 3 * GRAIN + 1234, []
    random = np.random.default_rng(0)
    gradients = (random.standard_normal((5, size)) * np.exp2(random.integers(-60, 60, (5, size)))).astype(np.float32)
    for threads, use_numba in [(1, False), (3, False), (1, True), (3, True)]:
        if use_numba:
            pytest.importorskip("numba")
        engine = CpuEngine(threads, use_numba)
        results.append(
            [
                rows_of(engine, gradients).ranked_mean(5, 1, 4).tobytes(),
                rows_of(engine, gradients).ranked_mean(4, 1, 3).tobytes(),
                rows_of(engine, gradients).scaled_mean([1.0, 0.3, 0.1, 1.0, 0.9]).tobytes(),
            ]
        )
        engine.close()
    assert all(each == results[0] for each in results)
    some = random.choice(size, 500, replace=False)
    ranked = np.sort(gradients[:, some], axis=0)[1:4]
    assert np.frombuffer(results[0][0], np.float32)[some].tolist() == [quotient(column) for column in ranked.T]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), INT8])
def test_rows_are_decoded_and_scaled(engine, unaligned, dtype) -> None:
    """At odd places, and without −0, whose rank beside 0 no order tells."""
    values = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    values[7] = -0.0
    if dtype == INT8:
        payload = np.empty(-(-len(values) // 256), INT8)
        encode_blocks(values, payload)
        decoded = decode_blocks(payload, 3000)
    else:
        payload = values.astype(dtype)
        decoded = payload.astype(np.float32)
    rows, buffer = engine.gradient_rows(3000, 2), engine.staging(3000).receive()
    rows.write(1, 3, buffer.put(0, unaligned(payload), 3000), 5, 2900, 0.7)
    want = np.zeros(3000, np.float32)
    want[3:2898] = decoded[5:2900] * np.float32(0.7) + np.float32(0.0)
    assert rows.values(1).tobytes() == want.tobytes()
    assert not rows.values(0).any()
    rows.zero(1, 0, 100)
    assert not rows.values(1)[:100].any() and rows.values(1)[100:].any()
    assert np.isclose(rows.sum_of_squares(1), (rows.values(1).astype(np.float64) ** 2).sum(), rtol=1e-12)


def test_memory_is_counted_and_given_back(engine) -> None:
    before = engine.statistics().allocated_bytes
    rows = engine.gradient_rows(1000, 3)
    assert engine.statistics().allocated_bytes == before + 12_000
    rows.close()
    rows.close()
    assert engine.statistics().allocated_bytes == before and rows.nbytes == 0 and ERROR_BLOCK <= GRAIN
    with pytest.raises(ResourceExhaustedError, match="no memory to aggregate"):
        engine.gradient_rows(1 << 50, 1 << 8)


def test_kernels_are_compiled_ahead(engine) -> None:
    engine.prepare_rows(np.dtype(np.float32))
