"""Engines, data and the CUDA shim, for the tests beside."""

from __future__ import annotations

import math
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.optimizers import LARGEST_NUMBER
from stepwire_server.engines import PARAM, CpuEngine, Engine
from stepwire_server.engines.protocol import Pass
from stepwire_server.rules import ACCUMULATED, AVERAGE, Decay, Precision, Recipe
from tests.support import cuda_shim
from tests.support.fake_cupy import FakeCupy

WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of the tests that need a GPU in which all were skipped: nothing was shown."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.markexpr == "gpu" and exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session", autouse=True)
def kernel_directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pathlib.Path]:
    """Keep compiled kernels between runs, beside pytest's own cache: compiling all of them lasts a while."""
    cache = getattr(request.config, "cache", None)
    directory = pathlib.Path(cache.mkdir("stepwire-kernels")) if cache else tmp_path_factory.mktemp("kernels")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWIRE_CACHE_DIR", str(directory))
        patch.delenv("CUPY_CACHE_DIR", raising=False)  # where pretended machine code would lie among the user's
        yield directory


@pytest.fixture(scope="session")
def shim() -> types.ModuleType:
    """The module `cuda_shim`, which needs g++."""
    module = cuda_shim
    if module.COMPILER is None:
        pytest.skip("g++ is not installed; it compiles the CUDA kernels for the processor")
    return module


@pytest.fixture
def fake_cupy(shim: types.ModuleType, kernel_directory: pathlib.Path) -> Callable[..., Any]:
    """Make stand-ins for CuPy, whose kernels the shim runs."""
    return lambda **options: FakeCupy(kernel_directory, **options)


@pytest.fixture(scope="session")
def wire() -> dict[str, np.dtype[Any]]:
    """The wire dtypes by name."""
    return WIRE


# Numbers of a step by name; none is a power of two, so that every product rounds.
NUMBERS = {
    **dict.fromkeys(("beta1", "beta2", "alpha", "momentum", "rho"), 0.9),
    **dict.fromkeys(("rate", "rate1", "rate2"), 0.1),
    **dict.fromkeys(("lr", "step_size", "next_size", "gradient_size"), 0.03),
    **dict.fromkeys(("eps", "eps_root"), 1e-6),
    **dict.fromkeys(("correction2", "c2"), 0.271),
    "inverse1": 3.69,
    "decay": 0.1,
    "trust": 0.37,
    "least": 0.0,
    "most": math.inf,
    "zero": 0.0,
    "largest": LARGEST_NUMBER,
    "factor": -0.3,
    "clip": 0.7,
    "limit": 0.05,
    "average_rate": 0.01,
}


FORGETFUL = dict.fromkeys(("beta1", "beta2", "alpha"), 0.0) | dict.fromkeys(("rate", "rate1", "rate2"), 1.0)
"""Numbers of recipes that keep nothing of the past."""


@pytest.fixture(scope="session")
def pass_of() -> Callable[..., Pass]:
    """Make a pass with plausible numbers; some may be given."""

    def make(recipe: Recipe, seed: int = 7, **numbers: float) -> Pass:
        kept = recipe.decay in (Decay.BEFORE, Decay.AFTER)
        known = NUMBERS | (FORGETFUL if recipe.forgotten else {}) | {"decay_scalar": 0.99 if kept else 0.1} | numbers
        return Pass(recipe, tuple(known[name] for name in recipe.scalars), seed)

    return make


@pytest.fixture(scope="session")
def slots_of() -> Callable[[Recipe], dict[str, Precision]]:
    """Return what a session with this recipe allocates."""

    def slots(recipe: Recipe) -> dict[str, Precision]:
        plain = {PARAM: Precision.FLOAT32, ACCUMULATED: Precision.FLOAT32, AVERAGE: Precision.FLOAT32}
        return {slot: plain.get(slot, recipe.precision) for slot in (PARAM, *recipe.slots)}

    return slots


@pytest.fixture(scope="session")
def make_arrays() -> Callable[..., dict[str, np.ndarray]]:
    """Make float32 arrays for a recipe's slots, by name, and the gradient; `special` mixes in the odd values."""

    def make(recipe: Recipe, size: int, seed: int = 0, special: bool = False) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        arrays = {"param": random.standard_normal(size), "gradient": random.standard_normal(size) / 10.0}
        for slot in recipe.slots:
            arrays[slot] = random.standard_normal(size) / 10.0
            if slot in recipe.rule.slots and slot not in ("exp_avg", "momentum_buffer", "grad_avg"):
                arrays[slot] **= 2
            if slot == "square_avg":  # of which RMSprop takes the square of the next off
                arrays[slot] += 0.01
            if slot == "grad_avg":
                arrays[slot] /= 10.0
        if special:
            odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-40, 3e38, -3e38, 1e-20, 1e20, 65519.0, 65520.0, 6e-8]
            for name, array in arrays.items():
                places = random.choice(size, size // 4, replace=False)
                values = random.choice(odd, len(places))
                array[places] = np.abs(values) if "_sq" in name else values
        with np.errstate(all="ignore"):
            return {name: array.astype(np.float32) for name, array in arrays.items()}

    return make


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[np.ndarray, np.ndarray], None]:
    """Compare bit by bit; any NaN equals any other."""

    def check(got: np.ndarray, want: np.ndarray, message: str = "") -> None:
        assert got.dtype == want.dtype and got.shape == want.shape
        bits = np.dtype(f"u{got.itemsize}")
        different = (got.view(bits) != want.view(bits)) & ~(np.isnan(got) & np.isnan(want))
        assert not different.any(), f"{message}: {got[different][:5]} instead of {want[different][:5]}"

    return check


@pytest.fixture(scope="session")
def unaligned() -> Callable[[np.ndarray], np.ndarray]:
    """Copy values to an address that is a multiple of nothing, read-only like the bytes of a message."""

    def copy(values: np.ndarray) -> np.ndarray:
        result = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
        result[...] = values
        result.flags.writeable = False
        return result

    return copy


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """Write arrays into the slots of a state."""

    def write(state: Any, arrays: dict[str, np.ndarray]) -> None:
        for slot, values in arrays.items():
            if slot != "gradient":
                state.write(slot, 0, values)

    return write


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, np.ndarray]]:
    """Read slots of a state, as float32."""

    def read(state: Any, slots: Any, size: int) -> dict[str, np.ndarray]:
        arrays = {slot: np.empty(size, np.float32) for slot in slots}
        for slot, array in arrays.items():
            state.read(slot, 0, array).wait()
        return arrays

    return read


@pytest.fixture(scope="session")
def run_step(
    unaligned: Callable[[np.ndarray], np.ndarray],
    slots_of: Callable[[Recipe], dict[str, Precision]],
    fill: Callable[..., None],
    contents: Callable[..., dict[str, np.ndarray]],
) -> Callable[..., tuple[dict[str, np.ndarray], tuple[float, ...]]]:
    """Run one update, from and to unaligned memory; returns the state's arrays, the reply as `out`, and the sums."""

    def run(
        engine: Engine,
        step: Pass,
        arrays: dict[str, np.ndarray],
        gradient: np.dtype[Any],
        reply: np.dtype[Any] | None,
        start: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, np.ndarray], tuple[float, ...]]:
        slots = slots_of(step.recipe)
        state = engine.allocate(slots, len(arrays[PARAM]))
        fill(state, arrays)
        with np.errstate(all="ignore"):
            staged = state.receive().put(0, unaligned(arrays["gradient"].astype(gradient)))
        out = None if reply is None else np.empty((end - begin) * reply.itemsize + 1, np.uint8)[1:].view(reply)
        sums = state.update(step, start, staged, begin, end, out).wait()
        result = contents(state, slots, len(arrays[PARAM]))
        state.close()
        return (result if out is None else {**result, "out": out.copy()}), sums

    return run


@pytest.fixture(scope="session")
def numpy_engine() -> Engine:
    """The engine that evaluates the rules' own functions: what the others are compared with."""
    return CpuEngine(use_numba=False)


@pytest.fixture(scope="session")
def check_same(
    numpy_engine: Engine,
    run_step: Callable[..., tuple[dict[str, np.ndarray], tuple[float, ...]]],
    make_arrays: Callable[..., dict[str, np.ndarray]],
    pass_of: Callable[..., Pass],
    assert_same_bits: Callable[..., None],
) -> Callable[..., None]:
    """Compare an engine with NumPy bit by bit, at odd sizes and offsets, with odd values among the others."""

    def check(engine: Engine, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        step = pass_of(recipe)
        for size, start, begin, end in [(1, 0, 0, 1), (3, 1, 0, 2), (67, 3, 5, 64), (1037, 2, 1, 1036), (5, 2, 2, 2)]:
            arrays = make_arrays(recipe, size, seed=size, special=True)
            options = (step, arrays, gradient, reply, start, begin, end)
            (got, _), (want, _) = run_step(engine, *options), run_step(numpy_engine, *options)
            assert got.keys() == want.keys()
            for name in want:
                assert_same_bits(got[name], want[name], f"{name} of {size}")

    return check
