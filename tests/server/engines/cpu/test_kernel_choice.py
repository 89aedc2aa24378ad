"""The kernels of an engine: Numba's, and NumPy's where Numba is missing or told to compile nothing."""

from __future__ import annotations

import importlib.util
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepwire.errors import UnsupportedFeatureError
from stepwire_server.engines.cpu.engine import CpuEngine, NumbaDisabledError
from stepwire_server.engines.cpu.numpy_kernels import NumpyKernels


def test_a_numba_that_compiles_nothing_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with caplog.at_level(logging.WARNING):
        engine = CpuEngine(threads=1)
    assert isinstance(engine._kernels, NumpyKernels)
    assert "NUMBA_DISABLE_JIT is set; unset it to compile kernels" in caplog.text
    engine.close()
    with pytest.raises(NumbaDisabledError, match="NUMBA_DISABLE_JIT is set"):
        CpuEngine(threads=1, use_numba=True)


def test_without_numba_the_kernels_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    engine = CpuEngine(threads=1)
    assert isinstance(engine._kernels, NumpyKernels)
    engine.close()


def test_a_broken_numba_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Its owner would not notice a server that is many times slower."""
    (tmp_path / "numba.py").write_text("raise ValueError('Number of threads\\nmust be > 0')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba" or name.endswith("numba_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UnsupportedFeatureError, match=r"\(ValueError: Number of threads must be > 0\); mend"
    ) as refused:
        CpuEngine(threads=1)
    assert "\n" not in str(refused.value)


_PROGRAM = """
import numpy as np, stepwire, stepwire_server.testing
with stepwire_server.testing.serving() as target, stepwire.connect(target) as client:
    with client.create_session({"w": np.ones(4, np.float32)}, optimizer=stepwire.SGD(lr=0.5)) as session:
        print(session.step({"w": np.float32([1, 2, 3, 4])})["w"].tolist())
"""


def test_a_server_serves_where_numba_compiles_nothing() -> None:
    pytest.importorskip("numba")
    done = subprocess.run(
        ["env", "NUMBA_DISABLE_JIT=1", sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{(1 - np.float32([0.5, 1, 1.5, 2])).tolist()}\n"
    assert done.stderr.startswith("warning: the kernels are NumPy's, many times slower")
