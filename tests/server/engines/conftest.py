"""Engines, data and the CUDA shim, for the tests beside."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.optimizers import Adam, AdamW
from stepwire_server.rules import ALL_RULES, Rule

WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@pytest.fixture(scope="session", autouse=True)
def kernel_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
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
def updates() -> list[Rule]:
    """One rule for each function that is compiled; the others differ in scalars only."""
    return list({rule.update: rule for rule in reversed(ALL_RULES)}.values())


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
                array[places] = np.abs(random.choice(odd, len(places))) if "_sq" in name else random.choice(odd, len(places))
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
def adam_rule() -> Rule:
    """The most common rule."""
    return ALL_RULES[0]


@pytest.fixture(scope="session")
def adamw() -> AdamW:
    """AdamW with visible decay."""
    return AdamW(lr=0.02, weight_decay=0.1)
