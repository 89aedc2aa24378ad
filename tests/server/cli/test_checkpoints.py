"""`stepwire checkpoint`: over a server, and on a data directory without one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import read_log
from stepwire_server.server import Server
from tests.server.cli.outcome import Outcome
from tests.support.numpy_server import numpy_server

PARAMETERS = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def durable(folder: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(folder)) as server:
        yield server


@pytest.fixture
def session(durable: Server) -> Iterator[stepwire.Session]:
    """A session two steps old, with a checkpoint of its first."""
    with stepwire.connect(durable.target) as client:
        session = client.create_session(PARAMETERS, durability="journal", keep=True)
        session.step(PARAMETERS)
        session.save_checkpoint("first")
        session.step(PARAMETERS)
        yield session


def test_checkpoints_are_saved_listed_verified_and_deleted(command: Any, durable: Server, session: Any) -> None:
    place = ("-t", durable.target)
    code, out, err = command("checkpoint", "save", session.session_id, "best", *place, "--json")
    saved = json.loads(out)
    assert (code, err, saved["name"], saved["step"], saved["load"]) == (0, "", "best", 2, 1)
    code, out, err = command("checkpoint", "list", session.session_id, *place, "--json")
    best, first = json.loads(out)
    assert (code, err, best, first["name"], first["step"]) == (0, "", saved, "first", 1)
    code, out, err = command("checkpoint", "verify", session.session_id, "best", *place)
    assert (code, out, err) == (0, "verified best, of step 2 and load 1, 0.0 MiB\n", "")
    outcome = command("checkpoint", "delete", session.session_id, "first", *place)
    assert outcome == Outcome(0, "deleted first\n", "")
    assert [info.name for info in session.checkpoints()] == ["best"]
    code, out, err = command("checkpoint", "delete", session.session_id, "first", *place)
    assert (code, out) == (2, "")
    assert err.startswith("stepwire: name: there is no checkpoint 'first'; there are best")


def test_a_checkpoint_is_verified_without_a_server(
    command: Any, durable: Server, session: Any, folder: pathlib.Path
) -> None:
    place = ("checkpoint", "verify", session.session_id, "first", "--data-dir", str(folder))
    path = folder / "sessions" / session.session_id / "checkpoints" / "first"
    with Checkpoint(Disk(), path) as checkpoint:
        arrays, shadow = checkpoint.manifest.arrays, checkpoint.manifest.shadow
    assert shadow is not None
    code, out, err = command(*place)
    assert (code, err) == (0, "")
    lines = [f"{slot:>20}  norm {facts.norm:.9g}  digest {facts.digest}" for slot, facts in arrays.items()]
    last = f"         shadow step  norm {shadow.update_norm:.9g}"
    assert out.splitlines() == ["verified first, of step 1 and load 1", *lines, last]
    code, out, err = command(*place, "--json")
    told = json.loads(out)
    assert (code, err, told["shadow_norm"]) == (0, "", shadow.update_norm)
    assert told["arrays"]["exp_avg"] == {"norm": arrays["exp_avg"].norm, "digest": arrays["exp_avg"].digest}
    assert len({each["digest"] for each in told["arrays"].values()}) == len(arrays)
    body = path / "state.safetensors"
    data = bytearray(body.read_bytes())
    data[-1] ^= 1
    body.write_bytes(data)
    code, out, err = command(*place)
    assert (code, out, "checkpoint file first/state.safetensors" in err) == (2, "", True)


def test_checkpoints_are_listed_in_a_table_while_the_session_is_parked(
    command: Any, durable: Server, session: Any, folder: pathlib.Path, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    session.save_checkpoint("bad")
    (folder / "sessions" / session.session_id / "checkpoints" / "bad" / "manifest.json").write_bytes(b"[]")
    session.detach()
    until(lambda: durable.registry.park(durable.registry.get(session.session_id)))
    code, out, _ = command("checkpoint", "list", session.session_id, "-t", durable.target)
    lines = {name: line for line in out.splitlines() for name in ("auto-", "bad ", "first ") if f" {name}" in line}
    assert (code, len(lines), "in the place of an object" in lines["bad "]) == (0, 3, True)
    assert durable.registry.statistics().sessions == 0


def test_a_checkpoint_is_exported_without_a_server(
    command: Any, durable: Server, session: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    state = session.state()
    session.save_checkpoint("best")
    session_id, target = session.session_id, tmp_path / "out" / "copy"
    durable.close()
    arguments = ("checkpoint", "export", "--data-dir", str(folder), session_id, "best", str(target))
    assert command(*arguments) == Outcome(0, f"copied best, of step 2 and load 1, to {target}\n", "")
    with Checkpoint(Disk(), target) as checkpoint:
        checkpoint.body.verify()
        values = np.empty(checkpoint.manifest.arrays["param"].elements, np.float32)
        checkpoint.body.read("param", 0, values)
    assert set(state.slots["param"]["w"].ravel()) <= set(values)
    code, out, err = command(*arguments)
    assert (code, out, "exists" in err) == (2, "", True)


@pytest.mark.parametrize(
    ("session_id", "name", "problem"),
    [("0" * 32, "first", "is not in"), ("../x", "first", "is not in"), (None, "../first", "is no name")],
)
def test_an_export_names_what_is_not_there(
    command: Any, session: Any, folder: pathlib.Path, tmp_path: pathlib.Path, session_id: Any, name: str, problem: str
) -> None:
    target = tmp_path / "copy"
    arguments = ("--data-dir", str(folder), session_id or session.session_id, name, str(target))
    code, out, err = command("checkpoint", "export", *arguments)
    assert (code, out, problem in err, target.exists()) == (2, "", True, False)
    code, out, err = command("checkpoint", "export", "--data-dir", str(tmp_path / "no"), "a", "b", str(target))
    assert (code, out, "is no data directory of a server" in err) == (2, "", True)


def test_a_damaged_checkpoint_is_not_exported(
    command: Any, session: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    body = folder / "sessions" / session.session_id / "checkpoints" / "first" / "state.safetensors"
    content = bytearray(body.read_bytes())
    content[-1] ^= 1
    body.write_bytes(content)
    target = tmp_path / "copy"
    arguments = ("--data-dir", str(folder), session.session_id, "first", str(target))
    code, out, err = command("checkpoint", "export", *arguments)
    assert (code, out, "first/state.safetensors: exp_avg_sq" in err, target.exists()) == (2, "", True, False)


def test_a_damaged_log_is_cut_when_it_is_confirmed(
    command: Any, durable: Server, session: Any, folder: pathlib.Path
) -> None:
    session_id = session.session_id
    durable.close()
    arguments = ("checkpoint", "repair", "--data-dir", str(folder))
    assert command(*arguments) == Outcome(0, f"the log in {folder / 'log'} has no damage\n", "")
    record = list(read_log(Disk(), folder / "log"))[-2]
    content = bytearray(record.path.read_bytes())
    content[record.offset + 20] ^= 1
    record.path.write_bytes(content)
    code, out, err = command(*arguments)
    assert (code, out, f"at byte {record.offset}" in err, "repeat with --yes" in err) == (2, "", True, True)
    assert record.path.read_bytes() == bytes(content)
    code, out, err = command(*arguments, "--yes", "--json")
    aside = f"{record.path}.cut-1"
    told = {"damaged": True, "path": str(record.path), "offset": record.offset, "set_aside": [aside]}
    assert (code, json.loads(out), err) == (0, told, "")
    assert pathlib.Path(aside).read_bytes() == bytes(content)
    assert json.loads(command(*arguments, "--json").out) == {"damaged": False}
    with numpy_server(data_dir=str(folder)) as second, stepwire.connect(second.target) as client:
        assert client.session(session_id).applied_step == 1
