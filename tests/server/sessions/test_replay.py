"""Replays of a journal beside its server: the same results, or those of other hyper-parameters."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import DataLossError, Reason, SessionNotFoundError
from stepwire_server.durability.read_only import ReadOnlyDisk
from stepwire_server.durability.reading import LogRecord
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.server import Server
from stepwire_server.sessions import replay as replay_module
from stepwire_server.sessions.replay import Replayer
from tests.support.numpy_server import numpy_pool, numpy_server

SHAPES = {"wide": (4100,), "b": (7,)}
STEPS = 6


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def server(folder: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(folder)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target) as client:
        yield client


@pytest.fixture
def replayer(folder: pathlib.Path) -> Iterator[Replayer]:
    with contextlib.closing(numpy_pool()) as pool:
        yield Replayer(folder, DurableCodec(), pool)


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Return all names below a folder, and the contents of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def told(results: Any) -> list[tuple[Any, ...]]:
    """Return all numbers of results, live ones or replayed ones."""
    return [
        (each.step, each.skipped, each.accumulated, each.grad_norm, each.clipped_grad_norm, each.clip_coefficient)
        + (each.update_norm, each.param_norm, each.loss_scale, each.non_finite_count)
        + tuple((group.grad_norm, group.t, group.update_norm, group.hyperparameters) for group in each.groups)
        for each in results
    ]


def stepped(session: stepwire.Session, steps: int = STEPS, **options: Any) -> list[stepwire.StepResult]:
    results = []
    for number in range(steps):
        session.step(arrays(number), **options)
        assert session.last_result is not None
        results.append(session.last_result)
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_precision": "int8", "gradient_dtype": "int8"},
        {"state_precision": "bfloat16", "gradient_dtype": "bfloat16", "clip_grad_norm": 0.5},
        {"accumulation_steps": 3, "optimizer": stepwire.SGD(momentum=0.9), "parameter_average_decay": 0.5},
        {"groups": [{"params": ["b"], "lr": 0.5, "schedule": stepwire.Schedule.cosine(4), "clip_grad_norm": 1.0}]},
        {"optimizer": stepwire.LAMB(), "clip_grad_value": 0.5},
        {"loss_scaling": stepwire.LossScaling(initial_scale=4.0, growth_interval=2)},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_replay_has_the_results_that_the_session_told(client: Any, folder: Any, replayer: Any, options: Any) -> None:
    session = client.create_session(arrays(99), durability="journal", **options)
    live = stepped(session)
    before = contents(folder)
    assert told(replayer.replay(session.session_id)) == told(live)
    assert contents(folder) == before


def test_skipped_steps_loads_and_overrides_are_made_again(client: Any, replayer: Any) -> None:
    session = client.create_session(arrays(99), durability="journal", non_finite="skip")
    live = stepped(session, 2)
    session.step({name: values * np.float32(np.inf) for name, values in arrays(7).items()})
    live.append(session.last_result)
    session.load(arrays(98))
    live += stepped(session, 2, lr=0.25, hyperparameters={"weight_decay": 0.5})
    found = replayer.replay(session.session_id)
    assert [each.skipped for each in found] == [False, False, True, False, False]
    assert [each.groups[0].hyperparameters.lr for each in found][3:] == [0.25, 0.25]
    assert repr(told(found)) == repr(told(live))  # the norm of the third is NaN


def test_a_replay_begins_with_the_checkpoint_that_is_named(client: Any, folder: Any, replayer: Any) -> None:
    session = client.create_session(arrays(99), durability="journal")
    live = stepped(session, 2)
    session.save_checkpoint("two")
    live += stepped(session, 3)
    before = contents(folder)
    assert told(replayer.replay(session.session_id, "two")) == told(live[2:])
    assert told(replayer.replay(session.session_id)) == told(live)
    session.save_checkpoint("last")
    with pytest.raises(stepwire.InvalidRequestError, match="the journal has no step that follows 'last', of step 5"):
        replayer.replay(session.session_id, "last")
    with pytest.raises(stepwire.InvalidRequestError, match="there is no checkpoint 'three'"):
        replayer.replay(session.session_id, "three")
    assert {name: data for name, data in contents(folder).items() if "last" not in name} == before


def test_other_numbers_make_the_steps_of_a_session_that_had_them(client: Any, replayer: Any) -> None:
    schedule = stepwire.Schedule.cosine(10)
    first = client.create_session(arrays(99), durability="journal", schedule=schedule)
    stepped(first)
    other = client.create_session(arrays(99), optimizer=stepwire.Adam(lr=0.5, betas=(0.5, 0.75), weight_decay=0.125))
    live = stepped(other)
    changes = {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.125}
    assert told(replayer.replay(first.session_id, changes=changes)) == told(live)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": -1.0}, "set.lr: lr is -1.0"),
        ({"rate": 1.0}, "set.rate: unknown hyper-parameter 'rate'"),
        ({"alpha": 0.5}, "set.alpha: 'alpha' is a hyper-parameter of other rules"),
        ({"momentum": 0.5}, "set.momentum: the session keeps no momentum buffer"),
    ],
)
def test_changes_that_are_none_are_refused(client: Any, replayer: Any, changes: Any, said: str) -> None:
    session = client.create_session(arrays(99), optimizer=stepwire.SGD(), durability="journal")
    stepped(session, 1)
    with pytest.raises(stepwire.InvalidRequestError) as caught:
        replayer.replay(session.session_id, changes=changes)
    assert said in str(caught.value)


def test_sessions_without_steps_in_a_journal_are_refused(client: Any, replayer: Any) -> None:
    saved = client.create_session(arrays(99), durability="checkpoint")
    with pytest.raises(stepwire.InvalidRequestError, match="has durability 'checkpoint', and no journal"):
        replayer.replay(saved.session_id)
    still = client.create_session(arrays(99), durability="journal")
    with pytest.raises(stepwire.InvalidRequestError, match="the journal has no step that follows a checkpoint"):
        replayer.replay(still.session_id)
    with pytest.raises(SessionNotFoundError):
        replayer.replay("0" * 32)


def test_a_record_that_is_being_written_is_no_damage(
    client: Any, replayer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look meets a half-written record behind which the server has gone on; the second one goes further."""
    session = client.create_session(arrays(99), durability="journal")
    live, looks, read_log = stepped(session, 3), [2, 3], replay_module.read_log

    def read(disk: Any, folder: Any) -> Iterator[LogRecord]:
        left = looks.pop(0) if looks else None
        for index, record in enumerate(read_log(disk, folder)):
            if index == left:
                raise DataLossError("damaged", reason=Reason.LOG_DAMAGED)
            yield record

    monkeypatch.setattr(replay_module, "read_log", read)
    assert told(replayer.replay(session.session_id)) == told(live)
    looks[:] = [2, 2, 3]
    with pytest.raises(DataLossError, match="damaged"):
        replayer.replay(session.session_id)


def test_a_disk_that_is_only_read_refuses_every_change(tmp_path: pathlib.Path) -> None:
    disk, file = ReadOnlyDisk(), tmp_path / "file"
    file.write_bytes(b"as it was")
    calls = [
        lambda: disk.open(file, 0o1),
        lambda: disk.open(tmp_path / "new", 0o102),
        lambda: disk.write(0, memoryview(b"x"), 0),
        lambda: disk.allocate(0, 1),
        lambda: disk.make_folder(tmp_path / "folder"),
        lambda: disk.rename(file, tmp_path / "other"),
        lambda: disk.link(file, tmp_path / "second"),
        lambda: disk.remove(file),
        lambda: disk.remove_folder(tmp_path),
    ]
    for call in calls:
        with pytest.raises(OSError, match="Read-only"):
            call()
    disk.sync(0)
    disk.sync_folder(tmp_path)
    assert contents(tmp_path) == {str(file): b"as it was"}
