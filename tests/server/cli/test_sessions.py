"""`stepwire sessions`: sessions listed, shown and closed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.observability.digests import digest_in_logs
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
    assert digest_in_logs(session.session_id) in row


def test_an_id_leads_to_its_log_lines(command: Any, server: Any, session: Any) -> None:
    digest = "~" + hashlib.sha256(session.session_id.encode()).hexdigest()[:12]
    assert command("sessions", "digest", session.session_id) == (0, digest + "\n", "")
    _, shown, _ = command("sessions", "show", session.session_id, "-t", server.target, "--json")
    assert json.loads(shown)["digest_in_logs"] == digest


def test_a_session_is_shown(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("sessions", "show", session.session_id, "-t", server.target, "--json")
    entry = json.loads(out)
    assert (code, err) == (0, "")
    assert (entry["session_id"], entry["tensors"]) == (session.session_id, {"w": [2, 3], "b": [4]})
    assert (entry["applied_step"], entry["ready"]) == (1, True)
    code, out, _ = command("sessions", "show", session.session_id, "-t", server.target)
    assert code == 0
    assert f"    session_id  {session.session_id}\n" in out


def test_ids_are_whole_in_a_pipe_and_on_a_narrow_terminal(
    command: Any, server: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`show` and `close` ask for them. In a pipe a session is one line."""
    code, out, _ = command("sessions", "list", "-t", server.target)
    (row,) = [line for line in out.splitlines() if session.session_id in line]
    assert (code, "nightly [run]" in row) == (0, True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, _ = command("sessions", "list", "-t", server.target)
    assert (code, session.session_id in out) == (0, True)


def test_a_session_is_shown_by_the_beginning_of_its_id(command: Any, server: Any, session: Any) -> None:
    code, out, _ = command("sessions", "show", session.session_id[:20], "-t", server.target, "--json")
    assert (code, json.loads(out)["session_id"]) == (0, session.session_id)
    code, out, err = command("sessions", "show", "no-such", "-t", server.target)
    assert (code, out, err) == (2, "", "stepwire: session 'no-such' does not exist here: no id begins so\n")


def test_a_session_in_memory_alone_has_no_durable_step(
    command: Any, server: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = command("sessions", "list", "-t", server.target)
    (row,) = [line for line in out.splitlines() if session.session_id in line]
    assert [cell.strip() for cell in row.split("│")[4:6]] == ["1", ""]


def test_a_session_is_closed(command: Any, server: Any, session: Any) -> None:
    code, out, _ = command("sessions", "close", session.session_id, "-t", server.target, "--json")
    assert (code, json.loads(out)) == (0, {"session_id": session.session_id, "applied_step": 1})
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()
    code, out, err = command("sessions", "close", session.session_id, "-t", server.target)
    assert (code, out) == (2, "")
    assert err == f"stepwire: session {session.session_id!r} does not exist here: no id begins so\n"


def test_closing_is_told_in_words(command: Any, server: Any, session: Any) -> None:
    outcome = command("sessions", "close", session.session_id, "-t", server.target)
    assert outcome == Outcome(0, f"closed {session.session_id} at step 1\n", "")


@pytest.fixture
def labelled(server: Any) -> Iterator[dict[str, str]]:
    """The ids of four sessions by their labels; all but the last are idle."""
    parameters = {"w": np.ones(2, np.float32)}
    with stepwire.connect(server.target) as client:
        sessions = {label: client.create_session(parameters, label=label) for label in ("a:1", "a:2", "b:1", "busy")}
        for session in sessions.values():
            session.step(parameters)
        for label in ("a:1", "a:2", "b:1"):
            sessions[label].detach()
        yield {label: session.session_id for label, session in sessions.items()}
        for session in sessions.values():
            session.close()


def left(server: Any, labelled: dict[str, str]) -> list[str]:
    """Return the labels of the sessions that are still there."""
    with stepwire.connect(server.target) as client:
        there = {session.session_id for session in client.sessions()}
    return [label for label, session_id in labelled.items() if session_id in there]


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        (["--label", "a:*"], ["b:1", "busy"]),
        (["--label", "a:1"], ["a:2", "b:1", "busy"]),
        (["--idle", "0s"], ["busy"]),
        (["--idle", "1d"], ["a:1", "a:2", "b:1", "busy"]),
        (["--idle", "0", "--label", "b*"], ["a:1", "a:2", "busy"]),
        (["--all"], []),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_sessions_are_closed_by_their_idle_time_and_label(
    command: Any, server: Any, labelled: Any, options: list[str], stay: list[str]
) -> None:
    code, out, _ = command("sessions", "close", "-t", server.target, "--json", *options)
    closed = {json.loads(line)["session_id"] for line in out.splitlines()}
    assert (code, left(server, labelled)) == (0, stay)
    assert closed >= {session_id for label, session_id in labelled.items() if label not in stay}


def test_sessions_are_closed_by_beginnings_of_their_ids(command: Any, server: Any, labelled: Any) -> None:
    one, other = labelled["a:1"], labelled["b:1"]
    outcome = command("sessions", "close", one[:20], other, one, "-t", server.target)
    assert outcome == Outcome(0, f"closed {one} at step 1\nclosed {other} at step 1\n", "")
    assert left(server, labelled) == ["a:2", "busy"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "ids: name sessions by their ids, --idle, --label or --all"),
        (["--idle", "soon"], "idle: 'soon' is no time such as 90s, 15m, 2h or 1d"),
        (["xyz"], "session 'xyz' does not exist here: no id begins so"),
    ],
)
def test_a_close_of_nothing_in_particular_is_refused(
    command: Any, server: Any, options: list[str], problem: str
) -> None:
    assert command("sessions", "close", "-t", server.target, *options) == Outcome(2, "", f"stepwire: {problem}\n")
