"""Checkpoints that are saved while steps go on, and servers whose disk fails."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason
from stepwire_server.durability.body import BodyWriter
from stepwire_server.durability.disk import Disk
from stepwire_server.server import Server
from stepwire_server.sessions import capture
from tests.integration.events import PATIENCE_SECONDS
from tests.support.numpy_server import numpy_server

BLOCKS = 3
SIZE = BLOCKS * capture.BLOCK - 5


def gradient(number: int, size: int = SIZE) -> dict[str, Any]:
    return {"w": np.random.default_rng((5, number)).standard_normal(size).astype(np.float32)}


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(tmp_path)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target) as connected:
        yield connected


def save(server: Server, session: stepwire.Session) -> None:
    directory = server.registry.directory
    assert directory is not None
    directory.checkpointer.checkpoint(server.registry.get(session.own_id))


def saved(server: Server, session: stepwire.Session) -> tuple[int, dict[str, bytes]]:
    """Return the step and the arrays of the newest checkpoint."""
    directory = server.registry.directory
    assert directory is not None
    checkpoint = directory.checkpoints(session.own_id).newest().checkpoint
    assert checkpoint is not None
    with checkpoint:
        arrays = {}
        for slot, facts in checkpoint.manifest.arrays.items():
            arrays[slot] = np.empty(facts.elements, np.float32)
            checkpoint.body.read(slot, 0, arrays[slot])
        return checkpoint.manifest.step, {slot: array[: len(array)].tobytes() for slot, array in arrays.items()}


def flat(state: Any) -> dict[str, bytes]:
    return {slot: arrays["w"].tobytes() for slot, arrays in state.slots.items()}


class Held:
    """Writes of a checkpoint's blocks, each of which waits to be let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self._let = threading.Semaphore(0), threading.Semaphore(0)
        write = BodyWriter.write

        def held(body: BodyWriter, slot: str, start: int, values: Any) -> None:
            self.begun.release()
            assert self._let.acquire(timeout=PATIENCE_SECONDS)
            write(body, slot, start, values)

        patch.setattr(BodyWriter, "write", held)

    def let_go(self, blocks: int = 1000) -> None:
        self._let.release(blocks)


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["whole", "overlap"])
def test_a_checkpoint_is_of_one_moment_while_steps_go_on(
    options: dict[str, Any], server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = client.create_session(
        {"w": np.zeros(SIZE, np.float32)}, durability="checkpoint", non_finite="allow", keep=True
    )
    for number in (1, 2):
        session.step(gradient(number), **options)
    moment, held = flat(session.state()), Held(monkeypatch)
    saving = threading.Thread(target=save, args=(server, session))
    saving.start()
    assert held.begun.acquire(timeout=PATIENCE_SECONDS)
    for number in (3, 4):  # the disk writes nothing meanwhile
        session.step(gradient(number), **options)
    later = flat(session.state())
    held.let_go()
    saving.join()
    assert saved(server, session) == (2, moment)
    assert later != moment
    assert session.info().durable_step == 2
    save(server, session)
    assert saved(server, session) == (4, later)


def test_a_step_that_overtakes_the_disk_waits_for_it(
    server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies that wait to be written have a bound, and the step that meets it goes on when a block is written."""
    monkeypatch.setattr(capture, "_WAITING_BYTES", 1)
    session = client.create_session({"w": np.zeros(SIZE, np.float32)}, durability="checkpoint", keep=True)
    session.step(gradient(1))
    moment, held = flat(session.state()), Held(monkeypatch)
    saving = threading.Thread(target=save, args=(server, session))
    saving.start()
    assert held.begun.acquire(timeout=PATIENCE_SECONDS)
    done = session.step_async(gradient(2))
    held.let_go()
    done.result(PATIENCE_SECONDS)
    saving.join()
    assert saved(server, session) == (1, moment)


@pytest.mark.parametrize("operation", ["load", "skip"])
def test_other_changes_wait_for_the_moment_too(
    operation: str, server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"non_finite": "skip"} if operation == "skip" else {}
    session = client.create_session(
        {"w": np.zeros(SIZE, np.float32)}, durability="journal", keep=True, accumulation_steps=3, **options
    )
    session.step(gradient(1))
    moment, held = flat(session.state()), Held(monkeypatch)
    saving = threading.Thread(target=save, args=(server, session))
    saving.start()
    assert held.begun.acquire(timeout=PATIENCE_SECONDS)
    if operation == "load":
        session.load({"w": np.ones(SIZE, np.float32)})
    else:
        broken = gradient(2)
        broken["w"][7] = np.inf
        session.step(broken)
        session.step(gradient(3))
        assert session.last_result is not None
        assert session.last_result.skipped
    held.let_go()
    saving.join()
    assert saved(server, session) == (1, moment)


@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_disk_refuses_steps_and_leaves_state_readable(
    call: str, number: int, server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = client.create_session({"w": np.zeros(100, np.float32)}, durability="journal", keep=True)
    in_memory = client.create_session({"w": np.zeros(100, np.float32)})
    first = session.step(gradient(1, 100))["w"].copy()

    def failing(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Disk, call, failing)
        with pytest.raises(stepwire.DataLossError, match=os.strerror(number)) as failed:
            session.step(gradient(2, 100))
    assert failed.value.reason == Reason.DURABILITY_FAILED
    for _ in range(2):  # the disk works again, and is not trusted
        with pytest.raises(stepwire.DataLossError) as failed:
            session.step(gradient(2, 100))
        assert failed.value.reason == Reason.DURABILITY_FAILED
    assert in_memory.step(gradient(1, 100))["w"].tobytes() == first.tobytes()
    assert session.state().step == 2  # applied, and told to nobody
    assert session.info().durable_step == 1


def test_what_a_failed_disk_has_not_confirmed_may_be_lost_and_the_rest_is_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with numpy_server(data_dir=str(tmp_path)) as server, stepwire.connect(server.target) as client:
        session = client.create_session({"w": np.zeros(100, np.float32)}, durability="journal", keep=True)
        expected = [session.step(gradient(number, 100))["w"].copy() for number in (1, 2)][-1]

        def failing(*_: Any) -> Any:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(Disk, "write", failing)
            with pytest.raises(stepwire.DataLossError):
                session.step(gradient(3, 100))
        session_id = session.session_id
    with numpy_server(data_dir=str(tmp_path)) as server, stepwire.connect(server.target) as client:
        again = client.session(session_id)
        assert (again.applied_step, again.pull()["w"].tobytes()) == (2, expected.tobytes())


@pytest.mark.parametrize("call", ["open", "write", "sync", "rename", "make_folder", "sync_folder"])
def test_a_session_that_cannot_be_kept_is_not_created(
    call: str, server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Disk, call, failing)
        with pytest.raises(stepwire.DataLossError, match="nothing was created") as failed:
            client.create_session({"w": np.zeros(100, np.float32)}, durability="checkpoint")
    assert failed.value.reason == Reason.DURABILITY_FAILED
    assert server.registry.statistics().sessions == 0
    assert server.registry.statistics().reserved_bytes == 0


@pytest.fixture
def pair(tmp_path: pathlib.Path) -> Iterator[Callable[[], Server]]:
    """Start servers on one data directory, all of which go on."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(numpy_server(data_dir=str(tmp_path)))


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_an_owner_that_was_fenced_answers_nothing_and_leaves_no_trace(durability: Any, pair: Any) -> None:
    old = pair()
    with stepwire.connect(old.target, timeout=20.0) as client:
        session = client.create_session({"w": np.zeros(100, np.float32)}, durability=durability, keep=True)
        session.step(gradient(1, 100))
        save(old, session)
        new = pair()
        acts: list[Callable[[], Any]] = [
            lambda: session.step(gradient(2, 100)),
            session.pull,
            session.state,
            lambda: session.load({"w": np.ones(100, np.float32)}),
            lambda: session.attach(take_over=True),
            lambda: client.create_session({"w": np.zeros(3, np.float32)}, durability=durability, keep=True),
        ]
        for act in acts:
            with pytest.raises((stepwire.FencedError, stepwire.DataLossError)) as fenced:
                act()
            assert fenced.value.reason in (Reason.NOT_PRIMARY, Reason.DURABILITY_FAILED)
        with pytest.raises(OSError, match="No such file"):
            save(old, session)
        with stepwire.connect(new.target) as other:
            again = other.session(session.own_id)
            assert again.applied_step == 1
            again.step(gradient(2, 100))
            assert [found.session_id for found in other.sessions()] == [session.own_id]
