"""Checkpoints in an object store: a server on another machine goes on with them, and an older one answers no more."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.durability import mirror
from stepwire_server.server import Server
from tests.integration.events import Happenings
from tests.integration.proxy import Proxy
from tests.integration.training import same_bits
from tests.support.numpy_server import numpy_server
from tests.support.raw import RawClient

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")

SIZE = 1000
START = mirror.Mirror.start


def gradient(number: int) -> dict[str, Any]:
    return {"w": np.random.default_rng((9, number)).standard_normal(SIZE).astype(np.float32)}


def created(client: stepwire.Client, **options: Any) -> stepwire.Session:
    return client.create_session({"w": np.ones(SIZE, np.float32)}, **{"durability": "journal", "keep": True} | options)


def steps(session: stepwire.Session, first: int, count: int) -> list[bytes]:
    replies: list[Any] = [session.step(gradient(number)) for number in range(first, first + count)]
    return [reply["w"].tobytes() for reply in replies]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the looks to the tests."""
    monkeypatch.setattr(mirror.Mirror, "start", lambda self: None)


@pytest.fixture
def objects(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "objects"


class Machine:
    """A machine with a disk of its own, on which servers run."""

    def __init__(self, folder: pathlib.Path, objects: pathlib.Path) -> None:
        """Have an empty disk."""
        self.folder, self._objects = folder, objects

    def server(self, **settings: Any) -> Any:
        """Run a server for a block."""
        return numpy_server(data_dir=str(self.folder), checkpoint_store=f"file://{self._objects}", **settings)


@pytest.fixture
def machines(tmp_path: pathlib.Path, objects: pathlib.Path) -> list[Machine]:
    return [Machine(tmp_path / f"machine-{number}", objects) for number in range(3)]


def mirror_of(server: Server) -> mirror.Mirror:
    assert server.registry.directory is not None
    found = server.registry.directory.own.mirror
    assert found is not None
    return found


def uploaded(server: Server) -> bool:
    """Bring the store up to date; False if that failed."""
    return mirror_of(server).look()


def checkpointed(server: Server, session: stepwire.Session) -> None:
    """Save an automatic checkpoint."""
    assert server.registry.directory is not None
    server.registry.directory.checkpointer.checkpoint(server.registry.get(session.own_id))


def connect(server: Server, **options: Any) -> stepwire.Client:
    return stepwire.connect(server.target, transport="tcp", timeout=120.0, **options)


@pytest.mark.parametrize("level", ["journal", "checkpoint"])
def test_another_machine_goes_on_from_the_newest_checkpoint(level: Any, machines: list[Machine]) -> None:
    first, second, _ = machines
    with first.server() as server, connect(server) as client:
        session = created(client, durability=level, label="mine", request_id="run")
        steps(session, 1, 2)
        session.save_checkpoint("best")
        best = session.state()
        steps(session, 3, 2)
        checkpointed(server, session)
        state = session.state()
        assert uploaded(server)
        ahead = steps(session.fork(durability="memory"), 5, 3)
        steps(session, 11, 1)  # lost with the machine
    with second.server() as server, connect(server) as client:
        assert [(each.session_id, each.label, each.parked) for each in client.sessions()] == [
            (session.own_id, "mine", True)
        ]
        again = client.session(session.own_id)
        assert same_bits(again.state(), state)
        assert (again.applied_step, again.info().durable_step) == (4, 4)
        assert [info.name for info in again.checkpoints()] == ["auto-0000000004-000001", "best"]
        assert created(client, request_id="run", durability=level, label="mine").own_id == session.own_id
        again.attach(take_over=True)
        assert steps(again, 5, 3) == ahead
        again.rollback(checkpoint="best")
        assert again.state().slots["exp_avg"]["w"].tobytes() == best.slots["exp_avg"]["w"].tobytes()


def test_a_machine_that_comes_back_later_is_behind(machines: list[Machine]) -> None:
    """It goes on with what the other one had; its own sessions are set aside."""
    first, second, _ = machines
    with first.server() as server, connect(server) as client:
        session = created(client)
        steps(session, 1, 1)
        checkpointed(server, session)
        assert uploaded(server)
        steps(session, 2, 5)
    with second.server() as server, connect(server) as client:
        again = client.session(session.own_id)
        again.attach(take_over=True)
        steps(again, 2, 1)
        checkpointed(server, again)
        assert uploaded(server)
        state = again.state()
    with first.server() as server, connect(server) as client:
        assert same_bits(client.session(session.own_id).state(), state)
        assert client.session(session.own_id).info().epoch == 3
    (aside,) = (first.folder / "superseded").iterdir()
    assert [path.name for path in (aside / "sessions").iterdir()] == [session.own_id]
    assert list((aside / "log").iterdir())


def test_the_older_of_two_servers_answers_nothing_more(machines: list[Machine]) -> None:
    first, second, _ = machines
    with first.server() as old, connect(old) as client:
        session = created(client)
        steps(session, 1, 1)
        checkpointed(old, session)
        assert uploaded(old)
        with second.server() as new, connect(new) as other:
            there = other.session(session.own_id)
            there.attach(take_over=True)
            steps(there, 2, 1)
            assert not uploaded(old)  # it looks
            for call in (lambda: session.step(gradient(3)), session.pull, lambda: created(client)):
                with pytest.raises(stepwire.FencedError) as refused:
                    call()
                assert refused.value.reason is stepwire.Reason.NOT_PRIMARY
            steps(there, 3, 1)
            checkpointed(new, there)
            assert uploaded(new)
            state = there.state()
    with machines[2].server() as third, connect(third) as client:
        assert same_bits(client.session(session.own_id).state(), state)


def test_a_restart_of_the_same_machine_goes_on_with_its_own_disk(machines: list[Machine]) -> None:
    first = machines[0]
    with first.server() as server, connect(server) as client:
        session = created(client)
        steps(session, 1, 1)
        checkpointed(server, session)
        assert uploaded(server)
        steps(session, 2, 2)
        state = session.state()
        shutil.copytree(first.folder, image := first.folder.with_name("image"))  # as after a crash
    shutil.rmtree(first.folder)
    image.rename(first.folder)
    with first.server() as server, connect(server) as client:
        assert same_bits(client.session(session.own_id).state(), state)
    assert not (first.folder / "superseded").exists()


def test_what_is_deleted_here_is_deleted_there(machines: list[Machine], objects: pathlib.Path) -> None:
    first, second, _ = machines
    with first.server(checkpoints_kept=2) as server, connect(server) as client:
        session, other = created(client), created(client)
        for number in range(1, 6):
            steps(session, number, 1)
            checkpointed(server, session)
            assert uploaded(server)
        session.save_checkpoint("best")
        other.save_checkpoint("best")
        assert uploaded(server)
        bodies = list(objects.glob(f"sessions/{session.own_id}/checkpoints/*/*/state.safetensors"))
        assert sorted(path.parent.parent.name for path in bodies) == [
            "auto-0000000004-000001",
            "auto-0000000005-000001",
            "best",
        ]
        session.delete_checkpoint("best")
        other.close()
        assert uploaded(server)
        assert not list(objects.glob(f"sessions/{session.own_id}/checkpoints/best/**/*.json"))
        assert not [path for path in objects.glob(f"sessions/{other.own_id}/**/*") if path.is_file()]
        assert len(list(objects.glob("index/*"))) == 2
    with second.server() as server, connect(server) as client:
        assert [each.session_id for each in client.sessions()] == [session.own_id]


def test_a_session_that_was_closed_while_the_store_was_away_is_closed_there_later(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machines[0]
    with first.server() as server, connect(server) as client:
        session = created(client)
        session.save_checkpoint("best")
        assert uploaded(server)
        session.close()
    with first.server() as server, connect(server) as client:
        assert list(client.sessions()) == []
        assert uploaded(server)
    with machines[1].server() as server, connect(server) as client:
        assert list(client.sessions()) == []


def test_steps_without_a_journal_are_durable_once_the_store_has_them(machines: list[Machine]) -> None:
    """A client with a window loses nothing with the machine."""
    first, second, _ = machines
    with first.server() as server, connect(server) as client:
        session, journalled = created(client, durability="checkpoint"), created(client)
        steps(session, 1, 2)
        steps(journalled, 1, 1)
        checkpointed(server, session)
        assert (session.info().durable_step, journalled.info().durable_step) == (0, 1)
        assert uploaded(server)
        assert session.info().durable_step == 2
        steps(session, 3, 1)
        checkpointed(server, session)
        assert session.info().durable_step == 2
    with first.server() as server, connect(server) as client:
        parked = next(each for each in client.sessions() if each.session_id == session.own_id)
        assert (parked.parked, parked.applied_step, parked.durable_step) == (True, 3, 2)
        again = client.session(session.own_id)
        assert (again.applied_step, again.info().durable_step) == (3, 2)
        again.attach(take_over=True)
        assert uploaded(server)
        assert again.info().durable_step == 3
        steps(again, 4, 1)
    with second.server() as server, connect(server) as client:
        assert client.session(session.own_id).applied_step == 3


def test_a_list_tells_what_the_store_has(machines: list[Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    with machines[0].server() as server, connect(server) as client:
        session = created(client)
        session.save_checkpoint("one")
        (info,) = session.checkpoints()
        assert (info.stored, info.store_problem) == (False, "")
        found = mirror_of(server)
        with monkeypatch.context() as patch:
            patch.setattr(found._objects, "upload", failing)
            assert not uploaded(server)
        (info,) = session.checkpoints()
        assert (info.stored, info.store_problem) == (False, "the store is away")
        assert steps(session, 1, 1)
        assert uploaded(server)
        assert session.verify_checkpoint("one") == (info := session.checkpoints()[0])
        assert (info.stored, info.store_problem) == (True, "")


def failing(*arguments: Any) -> None:
    raise OSError("the store is away")


@pytest.fixture
def stored(machines: list[Machine]) -> Iterator[stepwire.Session]:
    """A session of which the store has two checkpoints, of steps 1 and 2."""
    with machines[0].server() as server, connect(server) as client:
        session = created(client)
        for number in (1, 2):
            steps(session, number, 1)
            checkpointed(server, session)
        assert uploaded(server)
        yield session


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json", "session.json"])
def test_a_damaged_object_is_told_and_nothing_older_comes_in_its_place(
    file: str, stored: stepwire.Session, machines: list[Machine], objects: pathlib.Path
) -> None:
    paths = sorted(objects.glob(f"sessions/{stored.own_id}/**/{file}"))
    whole, data = paths[-1].read_bytes(), bytearray(paths[-1].read_bytes())
    data[len(data) // 2] ^= 1
    paths[-1].write_bytes(data)
    with machines[1].server() as server, connect(server) as client:
        with pytest.raises(stepwire.DataLossError) as told:
            client.session(stored.own_id)
        assert told.value.reason is stepwire.Reason.CHECKPOINT_DAMAGED
        assert uploaded(server)
    paths[-1].write_bytes(whole)
    with machines[1].server() as server, connect(server) as client:  # it is brought once its object is good again
        assert client.session(stored.own_id).applied_step == 2
    if file != "session.json":
        paths[-1].unlink()  # the operator goes on without it
        with machines[2].server() as server, connect(server) as client:
            assert client.session(stored.own_id).applied_step == 1


def test_a_session_that_cannot_be_brought_can_be_closed(
    stored: stepwire.Session, machines: list[Machine], objects: pathlib.Path
) -> None:
    for path in objects.glob("sessions/**/manifest.json"):
        path.write_bytes(b"none")
    with machines[1].server() as server, connect(server) as client:
        with RawClient(server.target) as raw:
            raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=stored.own_id))
        with pytest.raises(stepwire.SessionNotFoundError):
            client.session(stored.own_id)
        assert uploaded(server)
    assert not [path for path in objects.glob("sessions/**/*") if path.is_file()]


def test_a_directory_with_sessions_of_its_own_is_refused_a_store_of_another(
    stored: stepwire.Session, machines: list[Machine], objects: pathlib.Path
) -> None:
    with numpy_server(data_dir=str(machines[1].folder)) as server, connect(server) as client:
        own = created(client)
        steps(own, 1, 1)
    before = sorted(objects.rglob("*"))
    with pytest.raises(stepwire.InvalidRequestError, match="the sessions of another data directory"):
        with machines[1].server():
            pass
    assert sorted(objects.rglob("*")) == before
    with numpy_server(data_dir=str(machines[1].folder)) as server, connect(server) as client:
        assert client.session(own.own_id).applied_step == 1


def test_a_directory_that_never_had_a_store_is_copied_to_a_new_one(machines: list[Machine]) -> None:
    first, second, _ = machines
    with numpy_server(data_dir=str(first.folder)) as server, connect(server) as client:
        own = created(client)
        steps(own, 1, 1)
        checkpointed(server, own)
    with first.server() as server:
        assert uploaded(server)
    with second.server() as server, connect(server) as client:
        assert client.session(own.own_id).applied_step == 1


def test_a_store_needs_a_data_directory(objects: pathlib.Path) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="--data-dir"):
        with numpy_server(checkpoint_store=f"file://{objects}"):
            pass


@pytest.mark.parametrize("level", ["journal", "checkpoint"])
def test_a_client_that_lives_on_loses_no_step_with_the_machine_where_it_has_a_window(
    level: Any, machines: list[Machine]
) -> None:
    """With a journal the disk had acknowledged them, and the loss is told."""
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with numpy_server() as undisturbed, connect(undisturbed) as client:
        expected = steps(client.create_session({"w": np.ones(SIZE, np.float32)}), 1, 6)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(machines[0].server())
        proxy = stack.enter_context(Proxy(old.target))
        client = stack.enter_context(
            stepwire.connect(proxy.target, transport="tcp", timeout=120.0, retry=retry, window_bytes=1 << 20)
        )
        session = created(client, durability=level)
        assert steps(session, 1, 2) == expected[:2]
        checkpointed(old, session)
        assert uploaded(old)
        assert steps(session, 3, 1) == expected[2:3]
        checkpointed(old, session)  # the upload comes too late
        assert steps(session, 4, 1) == expected[3:4]
        new = stack.enter_context(machines[1].server())
        proxy.upstream = new.target
        old.close()
        if level == "checkpoint":
            assert steps(session, 5, 2) == expected[4:]
            return
        with pytest.raises(stepwire.DataLossError) as lost:
            steps(session, 5, 1)
        assert lost.value.reason is stepwire.Reason.DURABLE_STEP_LOST


def test_a_client_goes_on_with_a_directory_that_gets_a_store(machines: list[Machine]) -> None:
    """The client knows steps to be durable that the store has not yet; the disk has them."""
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(numpy_server(data_dir=str(machines[0].folder)))
        proxy = stack.enter_context(Proxy(old.target))
        client = stack.enter_context(stepwire.connect(proxy.target, transport="tcp", timeout=120.0, retry=retry))
        session = created(client, durability="checkpoint")
        steps(session, 1, 2)
        checkpointed(old, session)
        assert session.info().durable_step == 2
        old.close()
        new = stack.enter_context(machines[0].server())
        proxy.upstream = new.target
        steps(session, 3, 1)
        assert (session.applied_step, session.info().durable_step) == (3, 0)
        assert uploaded(new)
        assert session.info().durable_step == 2


def test_the_last_uploads_come_before_the_end(machines: list[Machine], objects: pathlib.Path) -> None:
    with machines[0].server() as server, connect(server) as client:
        session = created(client)
        steps(session, 1, 1)
        assert server.drain()
    with machines[1].server() as server, connect(server) as client:
        session = client.session(session.own_id)
        assert session.applied_step == 1
        mirror_of(server)._objects.upload = failing  # type: ignore[method-assign]
        session.attach(take_over=True)
        steps(session, 2, 1)
        assert not server.drain()


def test_the_thread_uploads_and_tries_again(machines: list[Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror.Mirror, "start", START)
    monkeypatch.setattr(mirror, "_LONGEST_DELAY_SECONDS", 0.01)
    failures, stored = Happenings(), Happenings()

    def once(upload: Any, *arguments: Any) -> None:
        if not failed:
            failed.append(True)
            failures.note()
            failing()
        upload(*arguments)

    failed: list[bool] = []
    with machines[0].server() as server, connect(server) as client:
        found = mirror_of(server)
        monkeypatch.setattr(found._objects, "upload", functools.partial(once, found._objects.upload))
        found.on_stored(lambda session_id, step: stored.note())
        session = created(client)
        session.save_checkpoint("best")
        failures.wait()
        stored.wait()
        assert session.checkpoints()[0].stored
