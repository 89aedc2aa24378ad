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
    assert summary["facts"]["workers"] == 2
    assert summary["facts"]["rows in the last batch"] < summary["facts"]["rows of the tables"] / 5
    assert set(summary["checks"].values()) == {True}
    assert (summary["plot"], summary["files"]) == (None, [])
