"""The GPU engine on a real device: what no other test here can show, by weight; what comes last may be left out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from stepwire.errors import UnsupportedFeatureError
from stepwire_server.engines import PARAM, CpuEngine, choose_engines
from stepwire_server.rules import Precision, Recipe
from tests.support import cuda_cases as cases
from tests.support import device_cases, telemetry_cases
from tests.support.time_left import TimeLeft

ROOT = pathlib.Path(__file__).parents[3]
TIME = TimeLeft()
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu_engine():
    try:
        (engine,) = choose_engines("cuda:0").engines
    except UnsupportedFeatureError as problem:
        pytest.skip(str(problem))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def numpy_engine():
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cpu_engine():
    """The CPU engine as it is installed: a Numba that does not suit this NumPy is no matter of the GPU's."""
    try:
        engine = CpuEngine()
    except ImportError:
        engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def time_is_left(request: pytest.FixtureRequest) -> None:
    """Leave out tests once the time that was given is over, each by its name; see `make gpu`."""
    TIME.require(request.node.name)


# --- the same bits as on the CPU: first, because everything else builds on them -----------------------------------


@pytest.mark.parametrize("gradient", cases.GRADIENTS)
def test_sums_and_accumulation_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, gradient) -> None:
    cases.check_gradients(gpu_engine, numpy_engine, gradient)


@pytest.mark.parametrize("case", [*cases.CASES, *cases.IN_BLOCKS], ids=lambda case: case.name)
def test_updates_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, case) -> None:
    cases.check_update(gpu_engine, numpy_engine, case)


@pytest.mark.parametrize("case", [*cases.LAYERWISE, *cases.LAYERWISE_IN_BLOCKS], ids=lambda case: case.name)
def test_measures_are_those_of_numpy_bit_for_bit(gpu_engine, numpy_engine, case) -> None:
    cases.check_measures(gpu_engine, numpy_engine, case)


# --- memory, and what ends it; `test_device_cases` tries the same on the stand-in ---------------------------------


@pytest.mark.parametrize("precision", Precision)
def test_what_is_accounted_for_is_taken(gpu_engine, precision) -> None:
    device_cases.check_accounting(gpu_engine, Recipe(cases.RULES[0], precision=precision), 20_000_003)


def test_what_a_closed_session_held_is_gone(gpu_engine) -> None:
    device_cases.check_zeroed(gpu_engine, 1_000_003)


def test_out_of_memory_leaves_sessions_usable(gpu_engine, cpu_engine) -> None:
    device_cases.check_shortage(gpu_engine, cpu_engine, 16_000_000)
    gpu_engine.self_test()


class Client:
    """Another process; see `device_cases.check_shared`."""

    def __init__(self, told: dict[str, Any]) -> None:
        command, pipe = [sys.executable, "-m", "tests.support.ipc_child"], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        assert self._answer(json.dumps(told)) == "written"

    def parameters(self) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(self._answer("")), np.float32)

    def close(self) -> None:
        self._process.communicate("\n", timeout=60)
        assert self._process.returncode == 0

    def _answer(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def test_another_process_writes_gradients_and_reads_parameters(gpu_engine, numpy_engine) -> None:
    try:
        device_cases.check_shared(gpu_engine, numpy_engine, 100_003, Client)
    except UnsupportedFeatureError as problem:
        pytest.skip(str(problem))


def test_a_device_that_fails_for_good_is_told_by_every_call(gpu_engine) -> None:
    command = [sys.executable, "-m", "tests.support.sticky_child"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    device_cases.check_lost(json.loads(done.stdout.splitlines()[-1]))


# --- beyond single kernels ----------------------------------------------------------------------------------------


def test_sessions_under_load_are_those_of_the_cpu(gpu_engine, cpu_engine) -> None:
    device_cases.check_load(gpu_engine, cpu_engine, 50_000_000)


def test_8_bit_moments_are_those_of_the_cpu(gpu_engine, cpu_engine) -> None:
    device_cases.check_mixed(gpu_engine, cpu_engine, 3_000_017)


@pytest.mark.parametrize("precision", Precision)
def test_state_goes_from_the_cpu_to_the_gpu_and_back(gpu_engine, cpu_engine, precision) -> None:
    device_cases.check_moves(gpu_engine, cpu_engine, precision, 1_000_003)


@pytest.mark.parametrize("recipe", telemetry_cases.RECIPES, ids=lambda recipe: recipe.name)
def test_measured_sums_are_right_over_all_of_float32s_range(gpu_engine, recipe) -> None:
    telemetry_cases.check_range(gpu_engine, recipe)


@pytest.mark.parametrize("name", cases.WIRE)
def test_a_large_sum_of_squares_is_that_of_numpy(gpu_engine, numpy_engine, name) -> None:
    values = np.random.default_rng(2).standard_normal(3_000_017).astype(cases.WIRE[name])
    sums = []
    for engine in (gpu_engine, numpy_engine):
        state = engine.allocate({PARAM: Precision.FLOAT32}, len(values))
        sums.append(state.sum_of_squares(state.receive().put(0, values), 3, len(values), 0.7).wait())
        state.close()
    assert sums[0] == sums[1]


@pytest.mark.parametrize("measures", [False, True])
def test_a_large_range_is_stepped_everywhere(gpu_engine, measures) -> None:
    """More elements than threads in the largest grid, so that kernels stride."""
    recipe, size = Recipe(cases.RULES[0], measures=measures), 65_535 * 256 + 1001
    state, out = gpu_engine.allocate(cases.slots_of(recipe), size), np.empty(size, np.float32)
    chunk = state.receive().put(0, np.ones(size, np.float32))
    sums = state.update(cases.step_of(recipe, 1), 0, chunk, 0, size, out).wait()
    state.close()
    assert len(np.unique(out)) == 1
    assert out[0] == pytest.approx(0.02, rel=1e-4)
    assert sums == pytest.approx((size * 0.02**2,) * 2 if measures else (), rel=1e-3)


# --- the whole server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conformance(gpu_engine):
    """A server on the GPU, and what checks it; it needs what the project's server needs."""
    for name in ("google_crc32c", "grpc", "grpc_health", "msgspec", "structlog"):
        pytest.importorskip(name, reason=f"{name} is not installed, which the server needs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        checking = importlib.import_module("conformance.checking")
        stored = list(importlib.import_module("conformance.stored_case").stored_cases())
    grpc, testing = importlib.import_module("grpc"), importlib.import_module("stepwire_server.testing")
    with testing.serving(device="cuda:0") as target, grpc.insecure_channel(target) as channel:
        yield types.SimpleNamespace(checking=checking, stored=stored, channel=channel)


@pytest.mark.parametrize("family", sorted(path.stem for path in (ROOT / "conformance" / "vectors").glob("*.json")))
def test_vectors_of_reference_frameworks(conformance, family) -> None:
    of_family = [case for case in conformance.stored if case.family == family]
    results = [conformance.checking.check(conformance.channel, case, 10) for case in of_family]
    wrong = [result for result in results if result.outcome != conformance.checking.PASSED]
    assert of_family and not wrong, "\n".join(f"{each.case}: {each.outcome}, {each.detail}" for each in wrong)
