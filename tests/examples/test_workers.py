"""The examples of several workers in their short form: what they print, and that a kill changes no bit."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")
pytestmark = pytest.mark.slow


def test_processes_train_as_one_does_though_one_of_them_is_killed(run_quickly: Any) -> None:
    summary = run_quickly("digits_workers.py", "--steps", "12")
    one, several, killed = summary["curves"].values()
    assert list(summary["curves"]) == ["one process", "4 workers", "one killed"]
    assert list(one) == list(several) == list(killed) == [str(step) for step in (1, 2, 4, 5, 6, 7, 8, 10, 11, 12)]
    assert one["1"] == pytest.approx(2.2904, rel=1e-4)
    assert several == pytest.approx(one, abs=1e-5)
    assert killed == several
    assert summary["facts"]["tensors that differ between workers, and with the kill"] == 0
    assert set(summary["checks"].values()) == {True}
    assert (summary["plot"], summary["files"]) == (None, [])


def test_clients_with_some_digits_each_learn_all_of_them(run_quickly: Any) -> None:
    summary = run_quickly("federated_digits.py")
    central, averaged, adaptive = summary["curves"].values()
    assert central["1"] == pytest.approx(1.334, rel=1e-2)
    assert averaged["12"] == pytest.approx(0.787, rel=0.05)
    assert adaptive["12"] == pytest.approx(0.416, rel=0.05)
    assert summary["facts"]["images of each client"] == [427, 298, 433, 279]
    assert summary["facts"]["test accuracy, FedAdam"] > 0.8
    assert set(summary["checks"].values()) == {True}
