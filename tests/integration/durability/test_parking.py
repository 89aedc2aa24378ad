"""Idle sessions on disk: parked when nobody uses them, or when there is no room, and back at their next call."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from stepwire_server.sessions import exchange
from tests.integration.events import PATIENCE_SECONDS, Happenings
from tests.integration.probes import half_applied, stream_ends
from tests.support.numpy_server import numpy_server
from tests.support.raw import RawClient, step_message

SIZE = 1000


def gradient(number: int) -> dict[str, Any]:
    return {"w": np.random.default_rng((5, number)).standard_normal(SIZE).astype(np.float32)}


Serve = Callable[..., Any]


def created(client: stepwire.Client, **options: Any) -> stepwire.Session:
    return client.create_session({"w": np.ones(SIZE, np.float32)}, **{"durability": "journal", "keep": True} | options)


@pytest.fixture
def serve(tmp_path: pathlib.Path) -> Iterator[Callable[..., Parking]]:
    """Run servers on one data directory; a later one after the end of the one before."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Parking:
            stack.close()
            return Parking(stack.enter_context(numpy_server(data_dir=str(tmp_path), **settings)))

        yield start


class Parking:
    """A server, and the waits for its streams to end.

    Attributes:
        server: the server.
        registry: its sessions.
    """

    def __init__(self, server: Server) -> None:
        """Watch a server."""
        self.server, self.registry = server, server.registry
        self._ends = stream_ends(server.registry)

    def connect(self, **options: Any) -> stepwire.Client:
        """Connect to the server."""
        return stepwire.connect(self.server.target, **options)

    def detach(self, session: stepwire.Session) -> None:
        """Detach a session, and wait until the server has noticed."""
        if session.statistics().attached:
            session.detach()
            self.await_end()

    def await_end(self) -> None:
        """Wait until the server has noticed the end of one more stream."""
        self._ends.wait()

    def park(self, session: stepwire.Session) -> bool:
        """Park a session."""
        self.detach(session)
        return self.registry.park(self.registry.get(session.session_id))


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_parked_session_goes_on_where_it_was(durability: Any, precision: Any, serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        usual = client.create_session({"w": np.ones(SIZE, np.float32)}, state_precision=precision)
        session = created(client, durability=durability, state_precision=precision)
        for number in range(1, 8):
            if number % 2:
                assert server.park(session)
                assert server.registry.statistics().sessions == 1
            assert (session.step(gradient(number))["w"] == usual.step(gradient(number))["w"]).all()
            assert session.last_result is not None
            assert session.last_result.step == number
        assert session.info().epoch == 1


def test_a_replay_after_parking_returns_the_result_of_its_step(serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        session = created(client)
        session.step(gradient(1))
        served = server.registry.get(session.session_id)
        last = served.ledger.last_result
        assert server.park(session)
        again = server.registry.get(session.session_id)
        assert again is not served
        assert again.ledger.last_result == last


def test_the_kernels_of_a_session_that_comes_back_keep_nobody_waiting(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    with server.connect() as client:
        session = created(client)
        session.step(gradient(1))
        assert server.park(session)
        (device,) = server.registry.pool
        prepare, begun, go_on = device.engine.prepare, threading.Event(), threading.Event()
        back: list[Any] = []

        def slowly(*arguments: Any) -> None:
            if threading.current_thread() is returning:
                begun.set()
                assert go_on.wait(PATIENCE_SECONDS)
            prepare(*arguments)

        monkeypatch.setattr(device.engine, "prepare", slowly)
        returning = threading.Thread(target=lambda: back.append(server.registry.get(session.session_id)))
        returning.start()
        assert begun.wait(PATIENCE_SECONDS)
        created(client)
        go_on.set()
        returning.join(PATIENCE_SECONDS)
        assert [each.ledger.applied_step for each in back] == [1]


def test_a_session_in_use_is_not_parked(serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        session = created(client)
        session.step(gradient(1))
        assert not server.registry.park(server.registry.get(session.session_id))
        assert server.registry.statistics().sessions == 1


def test_only_close_destroys(serve: Serve) -> None:
    now = 0.0
    server = serve(clock=lambda: now, max_lease_seconds=50.0)
    with server.connect() as client:
        session, other = created(client), client.create_session({"w": np.ones(SIZE, np.float32)}, keep=True)
        parameters = session.step(gradient(1))["w"].copy()
        server.detach(session)
        now = 100.0
        assert set(server.registry.sweep()) == {session.session_id, other.session_id}
        assert server.registry.statistics().sessions == 0
        assert (session.pull()["w"] == parameters).all()
        with pytest.raises(stepwire.SessionNotFoundError):
            other.pull()
        session.close()
        with pytest.raises(stepwire.SessionNotFoundError):
            client.session(session.session_id)
    with serve().connect() as client:
        with pytest.raises(stepwire.SessionNotFoundError):
            client.session(session.session_id)


def test_an_idle_session_makes_room(serve: Serve) -> None:
    budget = 3 * (12 * SIZE + 4 * SIZE)
    server = serve(memory_budget=budget)
    with server.connect(transport="tcp") as client:
        sessions = [created(client) for _ in range(6)]
        for number in (1, 2):
            for session in sessions:
                session.step(gradient(number))
                server.detach(session)
        assert server.registry.statistics().sessions < 6
        states = [session.state() for session in sessions]
        assert all(state.step == 2 for state in states)
        assert all((state.slots["param"]["w"] == states[0].slots["param"]["w"]).all() for state in states)


def test_a_request_finds_its_parked_session(serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        session = created(client, request_id="run-1")
        session.step(gradient(1))
        assert server.park(session)
        again = created(client, request_id="run-1")
        assert (again.session_id, again.applied_step) == (session.session_id, 1)
    with serve().connect() as client:
        assert created(client, request_id="run-1").session_id == session.session_id


def test_sessions_that_do_not_fit_together_are_recovered_one_after_another(
    serve: Serve, tmp_path: pathlib.Path
) -> None:
    server = serve()
    with server.connect(transport="tcp") as client:
        sessions = [created(client) for _ in range(5)]
        expected = [[session.step(gradient(number))["w"].tobytes() for number in (1, 2)][-1] for session in sessions]
        shutil.copytree(tmp_path, tmp_path.with_name("image"))  # as after a crash: every session has steps in the log
    room = 2 * 12 * SIZE + 4 * SIZE
    with numpy_server(data_dir=str(tmp_path.with_name("image")), memory_budget=room) as small:
        assert small.registry.statistics().sessions <= 2
        with stepwire.connect(small.target, transport="tcp") as client:
            for session, values in zip(sessions, expected, strict=True):
                again = client.session(session.session_id)
                assert (again.applied_step, again.pull()["w"].tobytes()) == (2, values)


def test_a_client_that_was_fenced_stays_fenced_after_parking_and_a_restart(serve: Serve) -> None:
    server = serve()
    with server.connect() as first, server.connect() as second:
        session = created(first)
        session.step(gradient(1))
        other = second.session(session.session_id)
        other.attach(take_over=True)
        assert other.applied_step == 1
        session.detach()
        other.detach()
        server.await_end()
        server.await_end()
        assert server.registry.park(server.registry.get(session.session_id))
        with pytest.raises(stepwire.FencedError):
            session.step(gradient(2))
        held = server.registry.get(session.session_id).ledger.worker.holder
    server = serve()
    assert server.registry.get(session.session_id).ledger.worker.holder.acquired == held.acquired


def test_a_checkpoint_comes_with_the_number_of_steps(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server, saves = serve(), Happenings()
    directory = server.registry.directory
    save = directory.checkpointer._save
    monkeypatch.setattr(directory.checkpointer, "_save", lambda each: (save(each), saves.note())[0])
    with server.connect() as client:
        session = created(client, durability=stepwire.Durability(level="checkpoint", every_steps=3))
        saves.wait()  # of the load
        for number in range(1, 4):
            session.step(gradient(number))
        saves.wait()
        assert session.info().durable_step == 3


def test_a_list_has_parked_sessions_and_leaves_them_there(serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        sessions = [created(client, label=f"session {number}") for number in range(3)]
        for session in sessions:
            session.step(gradient(1))
        assert server.park(sessions[1])
        listed = {info.session_id: info for info in client.sessions()}
        assert set(listed) == {session.session_id for session in sessions}
        assert [listed[session.session_id].parked for session in sessions] == [False, True, False]
        parked = listed[sessions[1].session_id]
        assert (parked.label, parked.applied_step, parked.durable_step, parked.ready) == ("session 1", 1, 1, True)
        assert server.registry.statistics().sessions == 2


def test_a_session_that_cannot_be_brought_back_can_be_closed(serve: Serve, tmp_path: pathlib.Path) -> None:
    server = serve()
    with server.connect() as client:
        session = created(client)
        session.step(gradient(1))
        assert server.park(session)
        for body in tmp_path.glob(f"sessions/{session.session_id}/checkpoints/*/state.safetensors"):
            body.write_bytes(b"damaged")
        with pytest.raises(stepwire.DataLossError, match="no checkpoint that is not damaged"):
            session.step(gradient(2))
        session.close()
        with pytest.raises(stepwire.SessionNotFoundError):
            client.session(session.session_id)
        assert list(tmp_path.glob("sessions/*")) == []


def test_more_sessions_than_a_server_holds_are_parked_in_turn(serve: Serve) -> None:
    server = serve(max_sessions=2)
    with server.connect() as client:
        sessions = [created(client) for _ in range(5)]
        for number in (1, 2):
            for session in sessions:
                session.step(gradient(number))
                server.detach(session)
        assert [session.info().applied_step for session in sessions] == [2] * 5


@pytest.mark.parametrize("level", [session_pb2.DURABILITY_JOURNAL, session_pb2.DURABILITY_CHECKPOINT])
def test_moments_that_came_before_the_parameters_are_parked_too(level: session_pb2.Durability, serve: Serve) -> None:
    server = serve()
    moments, parameters = np.full(SIZE, 5.0, np.float32), np.full(SIZE, 9.0, np.float32)
    with RawClient(server.server.target) as raw:
        config = session_pb2.SessionConfig(
            tensors=[tensor_pb2.TensorSpec(name="w", shape=[SIZE])],
            optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
            durability=level,
        )
        made = raw.call("CreateSession", pb.CreateSessionRequest(request_id="moments", config=config))
        session_id = made.session.session_id
        raw.load(session_id, made.attach_token, 1, moments, slot="exp_avg")
        assert server.registry.park(server.registry.get(session_id))
        assert raw.load(session_id, made.attach_token, 2, parameters).session.applied_load == 2
    with server.connect() as client:
        state = client.session(session_id).state()
        assert (state.slots["exp_avg"]["w"] == moments).all()
        assert (state.slots["param"]["w"] == parameters).all()


def test_a_hold_alone_does_not_keep_the_log(serve: Serve, tmp_path: pathlib.Path) -> None:
    server = serve(journal_segment_bytes=1 << 20, journal_bytes=4 << 20)
    directory = server.registry.directory
    with server.connect(transport="tcp") as first, server.connect(transport="tcp") as second:
        idle, busy = created(first), second.create_session({"w": np.ones(60_000, np.float32)}, durability="journal")
        idle.step(gradient(1))
        directory.checkpointer.look()
        second.session(idle.session_id).attach(take_over=True)
        for number in range(80):  # 19 MB
            busy.step({"w": np.full(60_000, float(number), np.float32)})
            directory.checkpointer.look()
        assert len(list((tmp_path / "log").iterdir())) <= 7


def test_checkpoints_go_on_after_one_that_failed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server, saved = serve(), Happenings()
    checkpointer = server.registry.directory.checkpointer
    save, failures = checkpointer._save, [RuntimeError("unexpected"), OSError("disk")]

    def failing(session: Any) -> Any:
        if failures:
            raise failures.pop()
        result = save(session)
        saved.note()
        return result

    monkeypatch.setattr(checkpointer, "_save", failing)
    with server.connect() as client:
        session = created(client, durability=stepwire.Durability(level="journal", every_steps=1))
        session.step(gradient(1))
        for _ in range(3):
            checkpointer.look()
        saved.wait()
        checkpoint = server.registry.directory.checkpoints(session.session_id).newest().checkpoint
        assert checkpoint is not None
        with checkpoint:
            assert checkpoint.manifest.step == 1


OVERLAP: dict[str, Any] = {"non_finite": "allow"}


@pytest.mark.parametrize("way", ["lease", "silence", "shutdown"])
def test_a_half_applied_step_is_dropped_where_the_disk_has_the_others(way: str, serve: Serve) -> None:
    """Its client is gone. The session goes on from the step before, and the log is no longer kept for it."""
    now = 0.0
    server = serve(clock=lambda: now, max_lease_seconds=500.0, step_idle_seconds=60.0)
    with server.connect(transport="tcp") as client:
        usual = client.create_session({"w": np.ones(SIZE, np.float32)}, **OVERLAP)
        session = created(client, **OVERLAP)
        for number in (1, 2):
            expected = usual.step(gradient(number), overlap=True)["w"].tobytes()
            assert session.step(gradient(number), overlap=True)["w"].tobytes() == expected
        before, ahead = session.state(), [usual.step(gradient(number))["w"].tobytes() for number in (3, 4)]
        server.detach(session)
        with RawClient(server.server.target) as raw:
            half_applied(server.registry, raw, session.session_id)
        half = server.registry.get(session.session_id)
        assert half.needed_record is not None
        if way == "shutdown":
            assert server.registry.checkpoint_all()
        else:
            now = 61.0 if way == "silence" else 501.0
            server.registry.sweep()
            assert session.session_id not in server.registry._sessions
        again = server.registry.get(session.session_id)
        assert again is not half
        assert (again.unfinished_step, again.needed_record, again.ledger.applied_step) == (0, None, 2)
        assert again.ledger.durable_step == 2
        if way != "shutdown":
            there = client.session(session.session_id)
            there.attach(take_over=True)
            assert there.state().slots["exp_avg"]["w"].tobytes() == before.slots["exp_avg"]["w"].tobytes()
            assert [there.step(gradient(number))["w"].tobytes() for number in (3, 4)] == ahead
            return
    server = serve()
    with server.connect(transport="tcp") as client:
        there = client.session(session.session_id)
        assert [there.step(gradient(number))["w"].tobytes() for number in (3, 4)] == ahead


def test_a_client_that_comes_back_sends_a_dropped_half_step_again(serve: Serve) -> None:
    server = serve()
    with server.connect(transport="tcp") as client, RawClient(server.server.target) as raw:
        session = created(client, **OVERLAP)
        session.step(gradient(1))
        server.detach(session)
        number = half_applied(server.registry, raw, session.session_id)
        token = server.registry.get(session.session_id).ledger.worker.holder.token
        assert server.registry.park(server.registry.get(session.session_id))
        stream = raw.attach(session.session_id, token)
        opened = stream.receive()
        assert opened is not None
        assert (opened.opened.applied_step, opened.opened.unfinished_step) == (number - 1, 0)
        assert stream.step(step_message(number, gradient(2)["w"])).step == number


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "steps since"])
def test_without_a_journal_a_half_applied_step_is_dropped_if_a_checkpoint_has_the_others(
    saved: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE_SECONDS", 0.0)
    server = serve()
    with server.connect(transport="tcp") as client, RawClient(server.server.target) as raw:
        session = created(client, durability="checkpoint", **OVERLAP)
        session.step(gradient(1))
        server.detach(session)
        if saved:
            server.registry.directory.checkpointer.checkpoint(server.registry.get(session.session_id))
        half_applied(server.registry, raw, session.session_id)
        half = server.registry.get(session.session_id)
        assert server.registry.park(half) is saved
        assert server.registry.checkpoint_all() is saved
        assert server.registry.get(session.session_id).unfinished_step == (0 if saved else 2)
        assert server.registry.get(session.session_id).ledger.applied_step == 1


def test_a_half_applied_step_stays_where_the_disk_has_failed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE_SECONDS", 0.0)
    server = serve()
    with server.connect(transport="tcp") as client, RawClient(server.server.target) as raw:
        session = created(client, **OVERLAP)
        session.step(gradient(1))
        server.detach(session)
        half_applied(server.registry, raw, session.session_id)

        def failing(mark: Any) -> None:
            raise stepwire.DataLossError("the disk failed", reason=stepwire.Reason.DURABILITY_FAILED)

        half = server.registry.get(session.session_id)
        monkeypatch.setattr(half.progress, "settle", failing)
        assert not server.registry.park(half)
        assert not server.registry.checkpoint_all()
        assert (half.unfinished_step, half.ledger.closed) == (2, False)


def test_a_session_that_there_was_no_room_for_comes_back_when_there_is(serve: Serve, tmp_path: pathlib.Path) -> None:
    server, image = serve(), tmp_path.with_name("image-of-two")
    with server.connect(transport="tcp") as client:
        large = client.create_session({"w": np.ones(4 * SIZE, np.float32)}, durability="journal", keep=True)
        small = created(client)
        for number in (1, 2):
            small.step(gradient(number))
            large.step({"w": np.full(4 * SIZE, float(number), np.float32)})
        states = {each.own_id: each.state().slots["exp_avg"]["w"].tobytes() for each in (large, small)}
        shutil.copytree(tmp_path, image)  # as after a crash
    with numpy_server(data_dir=str(image), memory_budget=20 * SIZE) as server_without_room:
        registry = server_without_room.registry
        directory = registry.directory
        assert directory is not None
        with stepwire.connect(server_without_room.target, transport="tcp") as client:
            there = client.session(small.own_id)
            assert there.state().slots["exp_avg"]["w"].tobytes() == states[small.own_id]
            with pytest.raises(stepwire.ResourceExhaustedError):
                client.session(large.own_id)
            directory.checkpointer.look()
            for device in registry.pool:
                device.budget.limit_bytes = 1000 * SIZE
            again = client.session(large.own_id)
            assert (again.applied_step, again.info().durable_step) == (2, 2)
            assert again.state().slots["exp_avg"]["w"].tobytes() == states[large.own_id]
