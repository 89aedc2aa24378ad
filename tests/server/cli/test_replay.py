"""`stepwire replay`: the curve of a journal, beside the server that writes it."""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server import engines
from stepwire_server.engines.choice import Choice
from stepwire_server.engines.cpu.engine import CpuEngine
from tests.support.numpy_server import numpy_server

PARAMETERS = {"w": np.ones(6, np.float32), "b": np.zeros(4, np.float32)}


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay by the engine of the test's server: the digits of norms are those of one engine."""
    engine = CpuEngine(threads=1, use_numba=False)
    monkeypatch.setattr(engines, "choose_engines", lambda device: Choice((engine,), f"{device} was asked for"))


def test_the_curve_is_that_of_the_live_session(command: Any, without_kernels: None, tmp_path: pathlib.Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "curve.csv"
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        groups = [{"params": ["b"], "lr": 0.5}]
        session = client.create_session(PARAMETERS, groups=groups, durability="journal")
        live = []
        for number in range(3):
            session.step({name: values + number for name, values in PARAMETERS.items()})
            last = session.last_result
            assert last is not None
            live.append([last.step, last.grad_norm, last.update_norm, last.param_norm, 0.001, False, 0.5])
        place = (session.session_id, "--data-dir", str(folder))
        code, printed, err = command("replay", *place, "--json")
        assert (code, err) == (0, "")
        assert [list(row.values()) for row in json.loads(printed)] == live
        code, printed, err = command("replay", *place)
        rows = list(csv.reader(printed.splitlines()))
        assert (code, err, rows[0]) == (0, "", [*"step grad_norm update_norm param_norm lr skipped lr1".split()])
        assert rows[1:] == [[str(value) for value in row] for row in live]
        changed = command("replay", *place, "--set", "lr=0.25", "--set", "betas=[0.5, 0.75]", "--out", str(out))
        assert changed == (0, f"wrote 3 steps to {out}\n", "")
        found = list(csv.DictReader(out.read_text().splitlines()))
        assert [(row["step"], row["lr"], row["lr1"]) for row in found] == [(str(n), "0.25", "0.25") for n in (1, 2, 3)]
        outcome = command("replay", *place, "--out", str(out))
        assert outcome == (2, "", f"stepwire: out: {out} exists; name a file that does not\n")


def test_norms_that_are_not_finite_are_null_in_json(
    command: Any, without_kernels: None, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "data"
    with numpy_server(data_dir=str(folder)) as server, stepwire.connect(server.target) as client:
        session = client.create_session(PARAMETERS, durability="journal", non_finite="skip")
        session.step({name: values + np.float32(np.inf) for name, values in PARAMETERS.items()})
        code, printed, err = command("replay", session.session_id, "--data-dir", str(folder), "--json")
    (row,) = json.loads(printed)
    assert (code, err, row["step"], row["grad_norm"], row["skipped"]) == (0, "", 1, None, True)


def test_changes_that_are_none_are_refused(command: Any, tmp_path: pathlib.Path) -> None:
    for text in ("lr", "lr=", "=3", "lr=fast"):
        outcome = command("replay", "0" * 32, "--data-dir", str(tmp_path), "--set", text)
        assert outcome == (2, "", f"stepwire: set: {text!r} is no number such as lr=0.001\n")
    code, _, err = command("replay", "0" * 32, "--data-dir", str(tmp_path))
    assert (code, err.startswith(f"stepwire: data_dir: {tmp_path} is no data directory")) == (2, True)
