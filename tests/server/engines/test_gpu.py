"""The GPU engine on a real device: what no other test here can show."""

from __future__ import annotations

import importlib.util
import pathlib
import types

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines import PARAM, CpuEngine, choose_engine
from stepwire_server.rules import Precision, Recipe


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load("cuda_cases")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu_engine():
    try:
        engine = choose_engine("cuda").engine
    except UnsupportedFeatureError as problem:
        pytest.skip(str(problem))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def numpy_engine():
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_updates_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, case) -> None:
    cases.check_update(gpu_engine, numpy_engine, case)


@pytest.mark.parametrize("case", cases.LAYERWISE, ids=lambda case: case.name)
def test_measures_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, case) -> None:
    cases.check_measures(gpu_engine, numpy_engine, case)


@pytest.mark.parametrize("gradient", cases.WIRE)
def test_sums_and_accumulation_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, gradient) -> None:
    cases.check_gradients(gpu_engine, numpy_engine, gradient)


@pytest.mark.parametrize("name", cases.WIRE)
def test_a_large_sum_of_squares_is_that_of_numpy(gpu_engine, numpy_engine, name) -> None:
    values = np.random.default_rng(2).standard_normal(3_000_017).astype(cases.WIRE[name])
    sums = []
    for engine in (gpu_engine, numpy_engine):
        state = engine.allocate({PARAM: Precision.FLOAT32}, len(values))
        sums.append(state.sum_of_squares(state.stage(values), 3, len(values), 0.7))
        state.close()
    assert sums[0] == sums[1]


@pytest.mark.parametrize("measures", [False, True])
def test_a_large_range_is_stepped_everywhere(gpu_engine, measures) -> None:
    """More elements than threads in the largest grid, so that kernels stride."""
    recipe, size = Recipe(cases.RULES[0], measures=measures), 65_535 * 256 + 1001
    state, out = gpu_engine.allocate(cases.slots_of(recipe), size), np.empty(size, np.float32)
    chunk = state.stage(np.ones(size, np.float32))
    sums = state.update(cases.step_of(recipe, 1), 0, chunk, 0, size, out)
    state.close()
    assert len(np.unique(out)) == 1
    assert out[0] == pytest.approx(0.02, rel=1e-4)
    assert sums == pytest.approx((size * 0.02**2,) * 2 if measures else (), rel=1e-3)


def test_what_a_closed_session_held_is_gone(gpu_engine) -> None:
    """Memory goes back as it is; an array that is still referred to shows what that was."""
    cupy = pytest.importorskip("cupy")
    state = gpu_engine.allocate({PARAM: Precision.FLOAT32}, 1000)
    state.write(PARAM, 0, np.full(1000, 2.0, np.float32))
    array = state._arrays[PARAM]
    state.close()
    assert not cupy.asnumpy(array).any()


def test_out_of_memory_is_an_error_and_leaves_the_device_usable(gpu_engine) -> None:
    with pytest.raises(ResourceExhaustedError):
        gpu_engine.allocate({PARAM: Precision.FLOAT32}, gpu_engine.device.memory_bytes // 2)
    gpu_engine.self_test()
