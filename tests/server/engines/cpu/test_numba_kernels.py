from __future__ import annotations

import logging
import os
import pathlib
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine
from stepwire_server.engines.compiled import cache as kernel_cache
from stepwire_server.rules import ALL_RULES, Decay, Precision, Recipe

pytest.importorskip("numba")

from stepwire_server.engines.cpu import numba_kernels
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels

pytestmark = pytest.mark.many

RECIPE = Recipe(ALL_RULES[0])
FLOAT32 = np.dtype(np.float32)

SCRIPT = """
import numpy as np
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels
from stepwire_server.rules import ALL_RULES, Recipe
kernels, dtype, recipe = NumbaKernels(), np.dtype(np.float32), Recipe(ALL_RULES[0])
for kernel in kernels.update(recipe, dtype, dtype), kernels.sum_of_squares(dtype, False):
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
arrays = [np.ones(100, np.float32) for _ in range(5)]
arrays[3:] = kernels.source(arrays[3]), kernels.target(arrays[4])
kernels.update(recipe, dtype, dtype)(*arrays, 0, 0, 0, 100, *[0.5] * len(recipe.scalars))
print(arrays[4].view(np.uint32).sum())
"""


def run_script(directory: pathlib.Path) -> list[str]:
    environ = {**os.environ, "STEPWIRE_CACHE_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path) -> None:
    *counts, total = run_script(tmp_path / "cache")
    assert counts == ["0 1", "0 1"]
    assert run_script(tmp_path / "cache") == ["1 0", "1 0", total]
    assert len(list((tmp_path / "cache").glob("*.py"))) == 2


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_does_not_stop_the_server(tmp_path) -> None:
    (tmp_path / "file").touch()
    assert run_script(tmp_path / "file")[:2] == ["0 1", "0 1"]


def steps_right(kernels: NumbaKernels) -> bool:
    """Step with m = v = ½ + ½, so p = 1 − ¼·1 / (1 + 1)."""
    param, first, second, gradient, out = (np.ones(3, np.float32) for _ in range(5))
    kernel = kernels.update(RECIPE, FLOAT32, FLOAT32)
    scalars = (1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 1.0)
    kernel(param, first, second, kernels.source(gradient), kernels.target(out), 0, 0, 0, 3, *scalars)
    return out.tolist() == [0.875] * 3


def test_a_full_disk_costs_the_cache_and_not_the_step(tmp_path, monkeypatch, caplog) -> None:
    def full(self, name: str, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    with caplog.at_level(logging.WARNING):
        assert steps_right(NumbaKernels(tmp_path))
    assert "No space left" in caplog.text


def test_a_directory_that_vanished_costs_the_cache_and_not_the_step(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert steps_right(NumbaKernels(tmp_path / "gone"))
    assert "is not cached" in caplog.text


def test_a_system_without_a_writable_place_still_steps(tmp_path, monkeypatch, caplog) -> None:
    def nowhere(**_: object) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(kernel_cache.tempfile, "mkdtemp", nowhere)
    kernel_cache._temporary.cache_clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEPWIRE_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert steps_right(NumbaKernels())
    kernel_cache._temporary.cache_clear()
    assert "no kernel cache" in caplog.text and "is not cached" in caplog.text


def test_a_damaged_cache_is_survived(tmp_path, caplog) -> None:
    assert steps_right(NumbaKernels(tmp_path))
    for file in (tmp_path / "__pycache__").glob("*.nb?"):
        file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert steps_right(NumbaKernels(tmp_path))
    assert "is not cached" in caplog.text


def test_rules_with_one_function_share_a_kernel(kernel_directory) -> None:
    kernels = NumbaKernels(kernel_directory)
    same = [Recipe(rule) for rule in ALL_RULES if rule.update is RECIPE.rule.update]
    assert len(same) > 1
    assert len({id(kernels.update(recipe, FLOAT32, FLOAT32)) for recipe in same}) == 1


def test_kernels_of_other_options_are_others(kernel_directory) -> None:
    kernels = NumbaKernels(kernel_directory)
    assert kernels.update(RECIPE, FLOAT32, FLOAT32) is not kernels.update(RECIPE, FLOAT32, None)
    assert kernels.sum_of_squares(FLOAT32, False) is not kernels.sum_of_squares(FLOAT32, True)


def test_other_types_are_refused_and_not_compiled(kernel_directory) -> None:
    kernel = NumbaKernels(kernel_directory).sum_of_squares(FLOAT32, False)
    with pytest.raises(TypeError, match="No matching definition"):
        kernel(np.ones(3, np.float64), 0, 0, 0, 3, 65_536, np.empty((1, 1)), 1.0)


LOOPS = [
    (Recipe(ALL_RULES[1], Decay.GRADIENT), "float16"),
    (Recipe(ALL_RULES[0]), "bfloat16"),
    (Recipe(ALL_RULES[0], accumulates=True, limits=True, averages=True, measures=True), "float32"),
    (Recipe(ALL_RULES[0], precision=Precision.BFLOAT16), "bfloat16"),
]


@pytest.mark.parametrize(("recipe", "name"), LOOPS, ids=lambda value: getattr(value, "name", value))
def test_the_loop_is_vectorised(recipe, name, wire, tmp_path) -> None:
    """A compiler that gave up on the loop would cost a factor of four, and nothing else would tell."""
    kernel = NumbaKernels(tmp_path).update(recipe, wire[name], wire[name])
    (code,) = kernel.inspect_llvm().values()
    assert re.search(r"fdiv <\d+ x float>", code)


CODES_OF_8_BITS = """
import numpy as np
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels
from stepwire_server.rules import ALL_RULES, Precision, Recipe
recipe, dtype = Recipe(ALL_RULES[0], precision=Precision.INT8), np.dtype(np.float32)
print(*NumbaKernels().update(recipe, dtype, dtype).inspect_llvm().values())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the look-ups are of vectors of x86-64")
def test_the_loop_over_codes_of_8_bits_is_vectorised(tmp_path) -> None:
    """The look-ups and the choice of what stands in for a product that underflowed, too.

    The code is that for processors with AVX-512, whichever this one is: look-ups of narrower vectors may not pay.
    """
    level = {"NUMBA_CPU_NAME": "x86-64-v4", "NUMBA_CPU_FEATURES": ""}
    environ = {**os.environ, **level, "STEPWIRE_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CODES_OF_8_BITS]
    code = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert re.search(r"fdiv <\d+ x float>", code) and re.search(r"fcmp une <\d+ x float>", code)


def test_what_is_kept_is_computed_without_fast_math(wire, tmp_path) -> None:
    """Reordering is for the sums of telemetry alone: no product, quotient or root has a flag."""
    recipe = Recipe(ALL_RULES[0], limits=True, measures=True)
    kernel = NumbaKernels(tmp_path).update(recipe, wire["float32"], wire["float32"])
    (code,) = kernel.inspect_llvm().values()
    assert re.search(r"fadd reassoc", code)
    assert not re.search(r"(fdiv|sqrt\S*) (fast|reassoc|contract|arcp|nnan|ninf|nsz|afn)", code)
    assert not re.search(r"\b(contract|fast|arcp|nnan|ninf|afn)\b <?", code)
    assert "llvm.fma" not in code and "fmuladd" not in code


def test_engine_reports_numba(kernel_directory) -> None:
    engine = CpuEngine()
    assert type(engine._kernels).__name__ == "NumbaKernels"
    engine.close()


def test_the_compiler_may_use_whole_vectors_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    features = "+avx2,+avx512f"
    monkeypatch.setattr(numba_kernels.numba.core.codegen, "get_host_cpu_features", lambda: features)
    for given, expected in ((None, f"{features},-prefer-256-bit"), ("+sse2", "+sse2")):
        monkeypatch.setattr(numba_kernels.numba.config, "CPU_FEATURES", given)
        numba_kernels.prefer_wide_vectors()
        assert numba_kernels.numba.config.CPU_FEATURES == expected
    features = "+avx2,-avx512f"
    monkeypatch.setattr(numba_kernels.numba.config, "CPU_FEATURES", None)
    numba_kernels.prefer_wide_vectors()
    assert numba_kernels.numba.config.CPU_FEATURES is None
