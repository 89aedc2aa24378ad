from __future__ import annotations

import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine
from stepwire_server.rules import ALL_RULES

pytest.importorskip("numba")

from stepwire_server.engines.numba_kernels import NumbaKernels  # noqa: E402

RULE = ALL_RULES[0]
FLOAT32 = np.dtype(np.float32)

SCRIPT = """
import numpy as np
from stepwire_server.engines.numba_kernels import NumbaKernels
from stepwire_server.rules import ALL_RULES
kernels, dtype = NumbaKernels(), np.dtype(np.float32)
for kernel in kernels.update(ALL_RULES[0], dtype, dtype), kernels.sum_of_squares(dtype):
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
arrays = [np.ones(100, np.float32) for _ in range(5)]
arrays[3:] = kernels.source(arrays[3]), kernels.target(arrays[4])
kernels.update(ALL_RULES[0], dtype, dtype)(*arrays, 0, 0, 0, 100, *[0.5] * 8)
print(arrays[4].view(np.uint32).sum())
"""


def run_script(directory: pathlib.Path) -> list[str]:
    environ = {**os.environ, "STEPWIRE_CACHE_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_second_process_loads_what_the_first_compiled(tmp_path) -> None:
    *counts, total = run_script(tmp_path / "cache")
    assert counts == ["0 1", "0 1"]
    assert run_script(tmp_path / "cache") == ["1 0", "1 0", total]
    assert len(list((tmp_path / "cache").glob("*.py"))) == 2


def test_a_cache_that_cannot_be_written_does_not_stop_the_server(tmp_path) -> None:
    (tmp_path / "file").touch()
    assert run_script(tmp_path / "file")[:2] == ["0 1", "0 1"]


def steps_right(kernels: NumbaKernels) -> bool:
    param, first, second, gradient, out = (np.ones(3, np.float32) for _ in range(5))
    kernel = kernels.update(RULE, FLOAT32, FLOAT32)
    scalars = (1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 1.0, 0.0)
    kernel(param, first, second, kernels.source(gradient), kernels.target(out), 0, 0, 0, 3, *scalars)
    return out.tolist() == [0.25] * 3


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


def test_a_damaged_cache_is_survived(tmp_path, caplog) -> None:
    assert steps_right(NumbaKernels(tmp_path))
    for file in (tmp_path / "__pycache__").glob("*.nb?"):
        file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert steps_right(NumbaKernels(tmp_path))
    assert "is not cached" in caplog.text


def test_rules_with_one_function_share_a_kernel(kernel_directory) -> None:
    kernels = NumbaKernels(kernel_directory)
    same = [rule for rule in ALL_RULES if rule.update is RULE.update]
    assert len(same) == 2
    assert kernels.update(same[0], FLOAT32, None) is kernels.update(same[1], FLOAT32, None)


def test_other_types_are_refused_and_not_compiled(kernel_directory) -> None:
    kernel = NumbaKernels(kernel_directory).sum_of_squares(FLOAT32)
    with pytest.raises(TypeError, match="No matching definition"):
        kernel(np.ones(3, np.float64), 0, 0, 3, 65_536, np.empty(1))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", ALL_RULES[:4], ids=lambda rule: rule.name)
def test_the_loop_is_vectorised(rule, name, wire, kernel_directory) -> None:
    """A compiler that gives up on the loop would cost a factor of four and nothing else would tell."""
    kernels = NumbaKernels(kernel_directory)
    kernel = kernels.update(rule, wire["float32"], wire["float32"])
    (code,) = kernel.inspect_llvm().values() or [""]
    if "define" not in code:
        pytest.skip("loaded from the cache without its intermediate code")
    assert "<8 x float>" in code or "<16 x float>" in code or "<4 x float>" in code


def test_engine_reports_numba(kernel_directory) -> None:
    engine = CpuEngine()
    assert type(engine._kernels).__name__ == "NumbaKernels"
    engine.close()
