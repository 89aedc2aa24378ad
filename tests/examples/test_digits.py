"""The three digits examples in their short form: what they print, and that a server's Adam is the local one."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from stepwire_server.testing import serving

pytestmark = pytest.mark.slow

STEPS = 60


def check(summary: dict[str, Any], local: str, *, first: float, last: float, apart: float) -> None:
    """Hold a summary to the losses that this data and these seeds make, and the runs to each other."""
    assert list(summary["curves"]) == [local, "stepwire"]
    mine, theirs = summary["curves"].values()
    assert list(mine) == list(theirs) == ["1", *(str(step) for step in range(6, STEPS + 1, 6))]
    assert mine["1"] == pytest.approx(first, rel=1e-4)
    assert mine[str(STEPS)] == pytest.approx(last, rel=0.02)
    assert theirs == pytest.approx(mine, abs=apart)
    facts = summary["facts"]
    assert facts["transport"] == "packets"
    assert facts["test accuracy, local"] > 0.9
    assert facts["test accuracy, stepwire"] == pytest.approx(facts["test accuracy, local"], abs=1.5 / 360)
    assert facts["largest difference of a parameter"] < 1e-4
    assert facts["difference of the last losses"] == abs(mine[str(STEPS)] - theirs[str(STEPS)])
    assert summary["checks"] == {"the last losses differ by less than 1e-4": True}


def test_in_numpy_on_a_server_that_runs_already(run_quickly: Any) -> None:
    with serving() as target:
        summary = run_quickly("digits_numpy.py", "--target", target)
    check(summary, "local float64", first=2.51027, last=0.51917, apart=1e-5)
    assert (summary["plot"], summary["files"]) == (None, [])


def test_in_torch_with_a_plot(run_quickly: Any) -> None:
    pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")
    summary = run_quickly("digits_torch.py", "--plot", "curves/torch.png")
    check(summary, "local torch", first=2.318, last=0.535, apart=1e-5)
    assert summary["files"] == ["curves"]
    assert pathlib.Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")


def test_in_jax(run_quickly: Any) -> None:
    """From the parameters of the NumPy example, on its batches, and so with its losses."""
    pytest.importorskip("optax", reason="optax is not installed (pip install optax==0.2.8)")
    summary = run_quickly("digits_jax.py")
    check(summary, "local optax", first=2.51027, last=0.51917, apart=5e-5)
    assert (summary["plot"], summary["files"]) == (None, [])
