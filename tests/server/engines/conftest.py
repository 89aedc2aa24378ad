"""Engines, data and the CUDA shim, for the tests beside."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.optimizers import Adam
from stepwire_server.engines import PARAM, CpuEngine, Engine
from stepwire_server.rules import Rule

WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@pytest.fixture(scope="session", autouse=True)
def kernel_directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pathlib.Path]:
    """Keep compiled kernels between runs, beside pytest's own cache: compiling all of them takes a while."""
    cache = getattr(request.config, "cache", None)
    directory = pathlib.Path(cache.mkdir("stepwire-kernels")) if cache else tmp_path_factory.mktemp("kernels")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWIRE_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(scope="session")
def shim() -> types.ModuleType:
    """The module `cuda_shim`, which needs g++."""
    path = pathlib.Path(__file__).with_name("cuda_shim.py")
    spec = importlib.util.spec_from_file_location("stepwire_test_cuda_shim", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if module.COMPILER is None:
        pytest.skip("g++ is not installed; it compiles the CUDA kernels for the processor")
    return module


@pytest.fixture
def fake_cupy(shim: types.ModuleType, kernel_directory: pathlib.Path) -> Callable[..., Any]:
    """Make stand-ins for CuPy."""
    return lambda **options: shim.FakeCupy(kernel_directory, **options)


@pytest.fixture(scope="session")
def wire() -> dict[str, np.dtype[Any]]:
    """The wire dtypes by name."""
    return WIRE


@pytest.fixture(scope="session")
def scalars_of() -> Callable[[Rule, int], tuple[float, ...]]:
    """Scalars of a rule with decay, in step t."""
    return lambda rule, t=3: rule.scalars(Adam(lr=0.02, eps=1e-6, weight_decay=0.1).hyperparameters(), t)


@pytest.fixture(scope="session")
def make_arrays() -> Callable[..., dict[str, np.ndarray]]:
    """Make float32 arrays for a rule's slots, by name, and the gradient; `special` mixes in the odd values."""

    def make(rule: Rule, size: int, seed: int = 0, special: bool = False) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        arrays = {"param": random.standard_normal(size), "gradient": random.standard_normal(size) / 10.0}
        for slot in rule.slots:
            arrays[slot] = random.standard_normal(size) / 10.0
            if slot != "exp_avg":
                arrays[slot] **= 2
        if special:
            odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-40, 3e38, -3e38, 1e-20, 1e20, 65519.0, 65520.0, 6e-8]
            for name, array in arrays.items():
                places = random.choice(size, size // 4, replace=False)
                array[places] = (
                    np.abs(random.choice(odd, len(places))) if "_sq" in name else random.choice(odd, len(places))
                )
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
def run_step(unaligned: Callable[[np.ndarray], np.ndarray]) -> Callable[..., dict[str, np.ndarray]]:
    """Run one update, from and to unaligned memory, and return the state's arrays, with the answer as `out`."""

    def run(
        engine: Engine,
        rule: Rule,
        arrays: dict[str, np.ndarray],
        gradient: np.dtype[Any],
        reply: np.dtype[Any] | None,
        start: int,
        begin: int,
        end: int,
        scalars: Sequence[float],
    ) -> dict[str, np.ndarray]:
        state = engine.allocate((PARAM, *rule.slots), len(arrays[PARAM]))
        for slot in (PARAM, *rule.slots):
            state.write(slot, 0, arrays[slot])
        with np.errstate(all="ignore"):
            staged = state.stage(unaligned(arrays["gradient"].astype(gradient)))
        out = None if reply is None else np.empty((end - begin) * reply.itemsize + 1, np.uint8)[1:].view(reply)
        state.update(rule, scalars, start, staged, begin, end, out)
        result = {slot: np.empty_like(arrays[slot]) for slot in (PARAM, *rule.slots)}
        for slot, array in result.items():
            state.read(slot, 0, array)
        state.close()
        return result if out is None else {**result, "out": out.copy()}

    return run


@pytest.fixture(scope="session")
def numpy_engine() -> Engine:
    """The engine that evaluates the rules' own functions: what the others are compared with."""
    return CpuEngine(use_numba=False)


@pytest.fixture(scope="session")
def check_same(
    numpy_engine: Engine,
    run_step: Callable[..., dict[str, np.ndarray]],
    make_arrays: Callable[..., dict[str, np.ndarray]],
    scalars_of: Callable[..., tuple[float, ...]],
    assert_same_bits: Callable[..., None],
) -> Callable[..., None]:
    """Compare an engine with NumPy bit by bit, at odd sizes and offsets, with odd values among the others."""

    def check(engine: Engine, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        for size, start, begin, end in [(1, 0, 0, 1), (3, 1, 0, 2), (67, 3, 5, 64), (1037, 2, 1, 1036), (5, 2, 2, 2)]:
            arrays = make_arrays(rule, size, seed=size, special=True)
            options = (rule, arrays, gradient, reply, start, begin, end, scalars_of(rule))
            got, want = run_step(engine, *options), run_step(numpy_engine, *options)
            assert got.keys() == want.keys()
            for name in want:
                assert_same_bits(got[name], want[name], f"{name} of {size}")

    return check
