"""`stepwire sessions`: sessions listed, shown and closed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.server.cli.outcome import Outcome


@pytest.fixture
def session(server: Any) -> Any:
    """A session one step old, with a label."""
    with stepwire.connect(server.target) as client:
        parameters = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
        with client.create_session(parameters, label="nightly [run]") as session:
            session.step(parameters)
            yield session


def test_sessions_are_listed(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("sessions", "list", "-t", server.target, "--json")
    (entry,) = [entry for entry in json.loads(out) if entry["session_id"] == session.session_id]
    assert (code, err) == (0, "")
    assert (entry["label"], entry["applied_step"], entry["durable_step"]) == ("nightly [run]", 1, 0)
    assert (entry["memory_bytes"], entry["device"], entry["attached"]) == (120, "cpu", True)
    assert entry["create_time"] < entry["expire_time"]


def test_sessions_are_listed_in_a_table(
    command: Any, server: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are text, never markup."""
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = command("sessions", "list", "-t", server.target)
    (row,) = [line for line in out.splitlines() if session.session_id in line]
    assert (code, "nightly [run]" in row) == (0, True)


def test_a_session_is_shown(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("sessions", "show", session.session_id, "-t", server.target, "--json")
    entry = json.loads(out)
    assert (code, err) == (0, "")
    assert (entry["session_id"], entry["tensors"]) == (session.session_id, {"w": [2, 3], "b": [4]})
    assert (entry["applied_step"], entry["ready"]) == (1, True)
    code, out, _ = command("sessions", "show", session.session_id, "-t", server.target)
    assert code == 0
    assert f"    session_id  {session.session_id}\n" in out


def test_a_session_is_closed(command: Any, server: Any, session: Any) -> None:
    code, out, _ = command("sessions", "close", session.session_id, "-t", server.target, "--json")
    assert (code, json.loads(out)) == (0, {"session_id": session.session_id, "applied_step": 1})
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()
    code, out, err = command("sessions", "close", session.session_id, "-t", server.target)
    assert (code, out) == (2, "")
    assert err.startswith(f"stepwire: session {session.session_id!r} does not exist here")


def test_closing_is_told_in_words(command: Any, server: Any, session: Any) -> None:
    outcome = command("sessions", "close", session.session_id, "-t", server.target)
    assert outcome == Outcome(0, f"closed {session.session_id} at step 1\n", "")
