"""`stepwire top`: lines for people and programs, in order, chosen, and of a server that comes back."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.statistics import ServerLoad, SessionProgress, Statistics
from stepwire.step_result import GroupResult, StepResult
from stepwire_server.cli import top as module
from stepwire_server.cli.top import heading, rows

LOAD = ServerLoad("a:1", 12, 3, 8, 1, 1234.4, {"cpu": 8 << 30}, {"cpu": 1 << 30}, False, 7384.0)


def progress(**fields: Any) -> SessionProgress:
    plain: dict[str, Any] = {
        "session_id": "ab" * 16,
        "label": "run",
        "device": "cpu",
        "activity": "attached",
        "transports": ("shm", "tcp"),
        "applied_step": 120,
        "durable_step": 117,
        "steps_per_second": 33.333,
        "memory_bytes": 3 << 20,
        "attached_workers": 2,
        "workers": 4,
        "idle_seconds": 0.0,
        "last_result": result(),
    }
    return SessionProgress(**plain | fields)


def result(**fields: Any) -> StepResult:
    groups = tuple(GroupResult(1.0, stepwire.Hyperparameters(lr=lr), 1) for lr in (0.001, 0.01))
    plain: dict[str, Any] = {"step": 1, "durable_step": 0, "epoch": 1, "replayed": False, "skipped": False}
    numbers = {"receive_seconds": 0.0, "queue_seconds": 0.0, "apply_seconds": 0.0, "non_finite_count": 0}
    norms = {"grad_norm": 2.5, "update_norm": 0.5, "param_norm": 100.0, "groups": groups}
    return StepResult(**plain | numbers | norms | fields)


def test_a_server_is_described_in_a_line() -> None:
    assert heading(LOAD) == "a:1: up 2h03m, 12 sessions and 3 parked, 8 streams, 1234 step/s, cpu 1 GiB of 8 GiB"


def test_a_session_is_a_line_with_everything_that_is_known() -> None:
    (row,) = rows([progress()])
    assert row.cells == (
        *("abababab", "run", "attached", "120", "3", "33.3", "2.5", "0.005", "0.001…0.01", "3 MiB"),
        *("2/4", "shm,tcp", ""),
    )
    assert not row.alarming
    fresh = progress(durable_step=None, steps_per_second=None, last_result=None, transports=(), idle_seconds=75.0)
    (row,) = rows([fresh])
    assert row.cells[4:9] == ("", "", "", "", "")
    assert row.cells[-1] == "1m15s"


def test_nan_and_damage_are_alarming() -> None:
    nan = progress(last_result=result(grad_norm=float("nan"), non_finite_count=3, skipped=True))
    assert [row.alarming for row in rows([nan, progress(activity="damaged"), progress()])] == [True, True, False]
    assert rows([nan])[0].cells[6] == "nan"


@pytest.fixture
def run(command: Any, server: Any) -> Any:
    """Run the command on the server for one snapshot."""
    return lambda *arguments: command("top", "-t", server.target, "--count", "1", "--timeout", "100", *arguments)


@pytest.fixture
def sessions(server: Any) -> Iterator[list[str]]:
    """Two sessions, the second one step older; returns their ids."""
    gradient = {"w": np.ones(10, np.float32)}
    with stepwire.connect(server.target) as client:
        with (
            client.create_session(gradient, label="top-one [red]") as first,
            client.create_session(gradient, label="top-two") as second,
        ):
            for _ in range(2):
                second.step(gradient)
            first.step(gradient)
            yield [first.session_id, second.session_id]


def test_lines_are_sorted_and_chosen(run: Any, server: Any, sessions: list[str]) -> None:
    first, second = (name[:8] for name in sessions)
    code, out, err = run("--filter", "top-", "--sort", "step")
    assert (code, err) == (0, "")
    described, columns, *lines = out.splitlines()
    assert described.startswith(f"{server.target}: up ")
    assert columns.split()[:4] == ["session", "label", "state", "step"]
    assert [line.split()[0] for line in lines if line] == [second, first]
    assert "top-one [red]" in lines[1]
    by_label = run("--filter", "top-", "--sort", "label").out.splitlines()[2:]
    assert [line.split()[0] for line in by_label if line] == [first, second]
    assert first not in run("--filter", sessions[1][:12]).out


def test_json_is_a_line_a_snapshot(run: Any, sessions: list[str]) -> None:
    code, out, _ = run("--json", "--filter", "top-", "--sort", "label")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert code == 0
    assert [session["session_id"] for session in found["sessions"]] == sessions
    assert found["sessions"][0]["last_result"]["grad_norm"] == pytest.approx(10**0.5, rel=1e-6)


def test_json_has_no_nan() -> None:
    spoilt = Statistics((LOAD,), (progress(last_result=result(grad_norm=float("nan"))),))
    assert module.plain(spoilt)["sessions"][0]["last_result"]["grad_norm"] is None


def test_a_terminal_is_redrawn(run: Any, sessions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich")
    monkeypatch.setattr(rich, "_console", importlib.import_module("rich.console").Console(width=20))  # of a test before
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    outcome = run("--filter", "top-")
    assert (outcome.code, outcome.err) == (0, "")
    assert "top-one [red]" in outcome.out, "a label is text, never markup"
    assert sessions[0][:8] in outcome.out


def test_without_rich_there_are_plain_lines(run: Any, sessions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    lines = run("--filter", "top-").out.splitlines()
    assert lines[1].split()[0] == "session"


def test_a_server_that_is_not_there_is_one_line(command: Any) -> None:
    code, out, err = command("top", "-t", "127.0.0.1:1", "--timeout", "0.5")
    assert (code, out) == (2, "")
    assert err.startswith("stepwire: ")


def test_a_server_that_is_lost_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Client:
        """Loses its server after each snapshot."""

        def statistics(self, **options: float) -> Iterator[Statistics]:
            yield Statistics((LOAD,), ())
            raise stepwire.UnavailableError("the server is gone")

    found = list(itertools.islice(module.snapshots(Client(), 0.0, 1.0), 3))  # type: ignore[arg-type]
    assert [each.servers for each in found] == [(LOAD,)] * 3
    assert capsys.readouterr().err == "stepwire: the server is gone; asking again\n" * 2
