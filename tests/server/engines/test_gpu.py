"""The GPU engine on a real device: what no other test here can show."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines import PARAM, choose_engine
from stepwire_server.rules import ALL_RULES

pytestmark = pytest.mark.gpu

UPDATES = {rule.update: rule for rule in reversed(ALL_RULES)}.values()
NAMES = ["float32", "bfloat16", "float16"]
KERNELS = list(itertools.product(UPDATES, NAMES, [None, *NAMES]))


def kernel_id(value: Any) -> str:
    return getattr(getattr(value, "update", None), "__name__", str(value))


@pytest.fixture(scope="module")
def gpu_engine():
    try:
        engine = choose_engine("cuda").engine
    except UnsupportedFeatureError as problem:
        pytest.skip(str(problem))
    yield engine
    engine.close()


@pytest.mark.parametrize(("rule", "gradient", "reply"), KERNELS, ids=kernel_id)
def test_gpu_is_numpy_bit_for_bit(gpu_engine, check_same, wire, rule, gradient, reply) -> None:
    check_same(gpu_engine, rule, wire[gradient], wire.get(reply))


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_squares_are_those_of_numpy(gpu_engine, numpy_engine, wire, name) -> None:
    values = np.random.default_rng(2).standard_normal(3_000_017).astype(wire[name])
    sums = []
    for engine in (gpu_engine, numpy_engine):
        state = engine.allocate((PARAM,), 0)
        sums.append(state.sum_of_squares(state.stage(values), 3, len(values)))
        state.close()
    assert sums[0] == sums[1]


def test_a_large_range_is_stepped_everywhere(gpu_engine, scalars_of) -> None:
    """More elements than threads in the largest grid, so that kernels stride."""
    rule, size = ALL_RULES[0], 65_535 * 256 + 1001
    state = gpu_engine.allocate((PARAM, *rule.slots), size)
    out = np.empty(size, np.float32)
    state.update(rule, scalars_of(rule, 1), 0, state.stage(np.ones(size, np.float32)), 0, size, out)
    state.close()
    assert len(np.unique(out)) == 1
    assert out[0] == pytest.approx(-0.02, rel=1e-4)


def test_out_of_memory_is_an_error_and_leaves_the_device_usable(gpu_engine) -> None:
    with pytest.raises(ResourceExhaustedError):
        gpu_engine.allocate((PARAM,), gpu_engine.device.memory_bytes // 2)
    gpu_engine.self_test()
