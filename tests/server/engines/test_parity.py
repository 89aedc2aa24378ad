"""Numba, NumPy and generated CUDA compute the same bits, and those of the formula in float64 up to rounding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine, CudaEngine
from stepwire_server.engines.cuda_source import sum_module, update_module
from stepwire_server.rules import ALL_RULES

GRADIENTS = ["float32", "bfloat16", "float16"]
REPLIES = [None, "float32", "bfloat16", "float16"]
UPDATES = {rule.update: rule for rule in reversed(ALL_RULES)}.values()
KERNELS = list(itertools.product(UPDATES, GRADIENTS, REPLIES))

# Compiling all 48 with Numba takes half a minute. Codecs and rules meet in one line of the generated loop, so every
# pair of codecs with one rule and every rule with one pair leave nothing untried.
NUMBA_KERNELS = [
    (rule, gradient, reply)
    for rule, gradient, reply in KERNELS
    if rule.update.__name__ == "adam" or (gradient, reply) == ("bfloat16", "float16")
]


def kernel_id(value: Any) -> str:
    return getattr(getattr(value, "update", None), "__name__", str(value))


@pytest.fixture(scope="module")
def numba_engine():
    pytest.importorskip("numba")
    engine = CpuEngine(threads=1, use_numba=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cuda_engine(shim, kernel_directory):
    """One library holds every kernel: g++ takes longer to start than to compile one."""
    updates = update_module((rule, gradient, reply) for rule, gradient, reply in KERNELS)
    sums = sum_module().removeprefix(updates[: updates.index("__device__ __forceinline__ float first_moment")])
    sums = sums[sums.index('extern "C"') :]
    return CudaEngine(cupy=shim.FakeCupy(kernel_directory, library=shim.Library(updates + sums, kernel_directory)))


@pytest.mark.parametrize(("rule", "gradient", "reply"), NUMBA_KERNELS, ids=kernel_id)
def test_numba_is_numpy_bit_for_bit(rule, gradient, reply, wire, numba_engine, check_same) -> None:
    check_same(numba_engine, rule, wire[gradient], wire.get(reply))


@pytest.mark.parametrize(("rule", "gradient", "reply"), KERNELS, ids=kernel_id)
def test_generated_cuda_is_numpy_bit_for_bit(rule, gradient, reply, wire, cuda_engine, check_same) -> None:
    check_same(cuda_engine, rule, wire[gradient], wire.get(reply))


@pytest.mark.parametrize(("rule", "gradient", "reply"), KERNELS, ids=kernel_id)
def test_numpy_is_the_formula_up_to_rounding(
    rule, gradient, reply, wire, numpy_engine, run_step, make_arrays, scalars_of, assert_same_bits
) -> None:
    """With the two tests above, this holds for every engine."""
    arrays, scalars = make_arrays(rule, 1037, seed=5), scalars_of(rule)
    got = run_step(numpy_engine, rule, arrays, wire[gradient], wire.get(reply), 2, 1, 1036, scalars)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    exact["gradient"] = arrays["gradient"].astype(wire[gradient]).astype(np.float64)
    inputs = [exact["param"][2:], exact["gradient"][1:1036], *(exact[slot][2:] for slot in rule.slots)]
    for slot, value in zip(("param", *rule.slots), rule.update(*inputs, *scalars), strict=True):
        np.testing.assert_allclose(got[slot][2:], value, rtol=3e-6, atol=1e-7, err_msg=slot)
        assert_same_bits(got[slot][:2], arrays[slot][:2], "outside the range")
    if reply is not None:
        assert_same_bits(got["out"], got["param"][2:].astype(wire[reply]), "the answer")


@pytest.mark.parametrize("name", GRADIENTS)
def test_sums_of_squares_are_the_same_bits_everywhere(
    name, wire, unaligned, numba_engine, numpy_engine, cuda_engine
) -> None:
    values = np.random.default_rng(2).standard_normal(200_003).astype(wire[name])
    engines = [numpy_engine, numba_engine, cuda_engine]
    states = [engine.allocate(("param",), 0) for engine in engines]
    staged = [state.stage(unaligned(values)) for state in states]
    for begin, end in [(0, 0), (0, 1), (3, 1003), (1, 65_537), (0, 131_072), (5, 200_003)]:
        sums = [state.sum_of_squares(chunk, begin, end) for state, chunk in zip(states, staged, strict=True)]
        exact = float(np.sum(values[begin:end].astype(np.float64) ** 2))
        assert sums[0] == pytest.approx(exact, rel=1e-13)
        assert sums == [sums[0]] * 3


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", GRADIENTS)
def test_sums_are_finite_exactly_if_every_element_is(name, odd, wire, numba_engine, numpy_engine, cuda_engine) -> None:
    largest = np.finfo(np.float32).max if name == "float32" else 60_000.0
    values = np.full(70_001, largest, wire[name])
    for engine in (numba_engine, numpy_engine, cuda_engine):
        state = engine.allocate(("param",), 0)
        assert np.isfinite(state.sum_of_squares(state.stage(values), 0, len(values)))
        for place in (0, 33, 65_535, 65_536, 70_000):
            broken = values.copy()
            broken[place] = odd
            assert not np.isfinite(state.sum_of_squares(state.stage(broken), 0, len(values)))
