"""The example of a recommender in its short form: the curves of its local run, and what it learns."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")
pytestmark = pytest.mark.slow


def test_embeddings_on_a_server_alone_learn_as_local_ones(run_quickly: Any) -> None:
    summary = run_quickly("two_tower.py")
    local, remote = summary["curves"].values()
    assert list(summary["curves"]) == ["local torch", "stepwire"]
    assert remote == pytest.approx(local, abs=1e-4)
    facts = summary["facts"]
    assert facts["workers"] == 2
    assert facts["MiB of the table of items"] == 10 * facts["MiB that a worker may allocate"] == 320
    assert facts["AUC, stepwire"] == pytest.approx(facts["AUC, local"], abs=1e-4) == pytest.approx(0.7316, abs=2e-3)
    assert "no worker can hold the table" in summary["checks"]
    assert set(summary["checks"].values()) == {True}
    assert (summary["plot"], summary["files"]) == (None, [])
