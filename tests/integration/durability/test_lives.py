"""Sessions that are parked, ended or saved while somebody else is at work, and disks that have changed meanwhile."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason
from stepwire.v1 import optimizer_pb2, session_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.durability.body import BodyWriter
from stepwire_server.durability.disk import Disk
from stepwire_server.server import Server
from tests.integration.events import PATIENCE_SECONDS
from tests.integration.probes import stream_ends
from tests.support.numpy_server import numpy_server
from tests.support.raw import RawClient, Refused

SIZE = 20_000


def gradient(value: float) -> dict[str, Any]:
    return {"w": np.full(SIZE, value, np.float32)}


def created(client: stepwire.Client, **options: Any) -> stepwire.Session:
    """Create a session of SGD with rate 1: the parameters are minus the sum of the gradients."""
    defaults: dict[str, Any] = {"durability": "journal", "keep": True, "optimizer": stepwire.SGD(lr=1.0)}
    return client.create_session({"w": np.zeros(SIZE, np.float32)}, **defaults | options)


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(tmp_path / "data")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target) as connected:
        yield connected


def detached(server: Server, *sessions: stepwire.Session) -> None:
    """Detach sessions that are attached, and wait until the server has noticed."""
    ends = stream_ends(server.registry)
    for session in sessions:
        session.detach()
        session.attach()
        session.detach()
        ends.wait()


def parked(server: Server, session: stepwire.Session) -> bool:
    detached(server, session)
    return server.registry.park(server.registry.get(session.own_id))


def save(server: Server, session: stepwire.Session) -> None:
    assert server.registry.directory is not None
    server.registry.directory.checkpointer.checkpoint(server.registry.get(session.own_id))


class Again:
    """A server on an image of the disk. A context manager."""

    def __init__(self, tmp_path: pathlib.Path, **settings: Any) -> None:
        """Copy the disk as it is."""
        self.image = tmp_path / f"image-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "data", self.image)
        self._settings = settings

    def values(self, session_id: str) -> tuple[int, float]:
        """Return the step of a session, and its first parameter."""
        with numpy_server(data_dir=str(self.image), **self._settings) as server:
            with stepwire.connect(server.target) as client:
                session = client.session(session_id)
                return session.info().applied_step, float(session.pull()["w"][0])


def test_a_session_that_is_stepped_while_it_is_parked_stays(
    server: Server, client: stepwire.Client, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = created(client)
    session.step(gradient(1.0))
    detached(server, session)
    writing, goes_on = threading.Event(), threading.Event()
    write = BodyWriter.write

    def held(body: BodyWriter, slot: str, start: int, values: Any) -> None:
        writing.set()
        assert goes_on.wait(PATIENCE_SECONDS)
        write(body, slot, start, values)

    outcome: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(BodyWriter, "write", held)
        parking = threading.Thread(
            target=lambda: outcome.append(server.registry.park(server.registry.get(session.own_id)))
        )
        parking.start()
        assert writing.wait(PATIENCE_SECONDS)
        session.step(gradient(10.0))
        goes_on.set()
        parking.join()
    assert outcome == [False]
    assert (session.applied_step, session.pull()["w"][0]) == (2, -11.0)
    assert Again(tmp_path).values(session.session_id) == (2, -11.0)


def damage(server: Server, session: stepwire.Session) -> str:
    """Damage the arrays of a session's newest checkpoint, and return its name."""
    assert server.registry.directory is not None
    checkpoint = server.registry.directory.checkpoints(session.own_id).newest().checkpoint
    assert checkpoint is not None
    checkpoint.close()
    folder = server.registry.directory.checkpoints(session.own_id).folder / checkpoint.name
    body = bytearray((folder / "state.safetensors").read_bytes())
    body[-100] ^= 1
    (folder / "state.safetensors").write_bytes(body)
    return checkpoint.name


def test_a_damaged_checkpoint_of_a_parked_session_is_made_good_by_the_log(
    server: Server, client: stepwire.Client, tmp_path: pathlib.Path
) -> None:
    session = created(client)
    for number in range(1, 7):
        session.step(gradient(float(number)))
        if number == 3:
            save(server, session)
    assert parked(server, session)
    damage(server, session)
    assert session.step(gradient(100.0))["w"][0] == -121.0
    assert session.applied_step == 7
    save(server, session)
    image = Again(tmp_path)
    assert image.values(session.own_id) == (7, -121.0)
    assert image.values(session.own_id) == (7, -121.0)  # the damaged one counted for nothing


def test_a_damaged_checkpoint_without_a_log_is_refused_until_it_is_deleted(
    server: Server, client: stepwire.Client
) -> None:
    session = created(client, durability="checkpoint")
    session.step(gradient(1.0))
    save(server, session)
    session.step(gradient(1.0))
    assert parked(server, session)
    name = damage(server, session)
    with pytest.raises(stepwire.DataLossError, match=f"checkpoint {name!r} of step 2 is damaged, .* ends at step 1"):
        session.pull()
    told = {info.name: info.damage for info in session.checkpoints()}
    assert told.pop(name).startswith("its arrays were damaged")
    assert set(told.values()) == {""}
    session.delete_checkpoint(name)
    with pytest.raises(stepwire.StateLossError, match="has lost steps 2 to 2"):
        session.pull()
    assert session.pull()["w"][0] == -1.0


def test_a_load_and_a_step_whose_arrivals_overlap_are_both_recovered(server: Server, tmp_path: pathlib.Path) -> None:
    ones = np.ones(SIZE, np.float32)
    with RawClient(server.target) as raw:
        config = session_pb2.SessionConfig(
            tensors=[tensor_pb2.TensorSpec(name="w", shape=[SIZE])],
            optimizer=optimizer_pb2.Optimizer(
                rule=optimizer_pb2.RULE_SGD, hyperparameters=optimizer_pb2.Hyperparameters(lr=1.0)
            ),
            initialization=session_pb2.INITIALIZATION_ZEROS,
            durability=session_pb2.DURABILITY_JOURNAL,
        )
        made = raw.call("CreateSession", pb.CreateSessionRequest(request_id="overlapping", config=config))
        session_id, token = made.session.session_id, made.attach_token

        def load() -> Iterator[pb.LoadRequest]:
            opening = state_pb2.LoadOpen(session_id=session_id, attach_token=token, load=1, slots=["param"])
            yield pb.LoadRequest(open=opening)
            yield pb.LoadRequest(
                slot="param", chunk=tensor_pb2.Chunk(offset=0, count=SIZE), payload=(9 * ones).tobytes()
            )
            assert arrived.wait(PATIENCE_SECONDS)
            yield pb.LoadRequest(commit=True)

        arrived = threading.Event()
        loading = threading.Thread(target=lambda: raw.call("Load", load()))
        session = server.registry.get(session_id)
        staged = session.exchange.loading
        begun = threading.Event()

        def told(*arguments: Any) -> Any:
            begun.set()
            return staged(*arguments)

        session.exchange.loading = told  # type: ignore[method-assign]
        loading.start()
        assert begun.wait(PATIENCE_SECONDS)
        step = pb.StepRequest(
            session_id=session_id, attach_token=token, begin=step_pb2.StepBegin(step=1), payload=ones.tobytes()
        )
        assert raw.call("Step", step).result.durable_step == 1
        arrived.set()
        loading.join()
        step.begin.step = 2
        assert raw.call("Step", step).result.durable_step == 2
    assert Again(tmp_path).values(session_id) == (2, 8.0)


def test_a_client_that_lost_the_worker_cannot_end_a_session_that_has_no_room(tmp_path: pathlib.Path) -> None:
    settings = {"data_dir": str(tmp_path / "data"), "memory_budget": 12 * SIZE}
    with numpy_server(**settings) as server, stepwire.connect(server.target, transport="tcp") as first:
        session = created(first)
        lost = server.registry.get(session.own_id).ledger.worker.holder.token
        with stepwire.connect(server.target, transport="tcp") as second:
            held = second.session(session.session_id)
            held.attach(take_over=True)
            detached(server, held)
            assert server.registry.park(server.registry.get(session.own_id))
            other = second.create_session({"v": np.zeros(SIZE + SIZE // 2, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
            with RawClient(server.target) as raw, pytest.raises(Refused) as refused:
                raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=session.own_id, attach_token=lost))
            assert refused.value.reason in (Reason.MEMORY_EXHAUSTED, Reason.FENCED)
            other.close()
            assert held.info().applied_step == 0


def test_a_session_that_could_not_be_removed_is_as_durable_as_before(
    server: Server, client: stepwire.Client, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = created(client)
    session.step(gradient(1.0))

    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, RawClient(server.target) as raw:
        patch.setattr(Disk, "rename", failing)
        with pytest.raises(Refused, match="it is still there, end it again") as refused:
            raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=session.session_id))
    assert refused.value.reason == Reason.DURABILITY_FAILED
    session.step(gradient(1.0))
    save(server, session)
    assert Again(tmp_path).values(session.session_id) == (2, -2.0)


def test_a_flipped_bit_of_a_config_is_found_and_keeps_no_other_session(
    server: Server, client: stepwire.Client, tmp_path: pathlib.Path
) -> None:
    sessions = [created(client) for _ in range(2)]
    for session in sessions:
        session.step(gradient(1.0))
    image = Again(tmp_path)
    path = image.image / "sessions" / sessions[0].session_id / "session.json"
    text = bytearray(path.read_bytes())
    text[text.index(b'"config":"') + 30] ^= 1
    path.write_bytes(text)
    with pytest.raises(stepwire.DataLossError, match="describes no session"):
        image.values(sessions[0].session_id)
    assert image.values(sessions[1].session_id) == (1, -1.0)


def test_the_log_is_let_go_after_a_restart_of_a_session_without_steps(tmp_path: pathlib.Path) -> None:
    settings = {"data_dir": str(tmp_path / "data"), "journal_segment_bytes": 1 << 20}
    with numpy_server(**settings) as server, stepwire.connect(server.target) as client:
        session = created(client)
        with stepwire.connect(server.target) as other:
            other.session(session.session_id).attach(take_over=True)
    with numpy_server(**settings) as server, stepwire.connect(server.target, transport="tcp") as client:
        busy = created(client, durability=stepwire.Durability(level="journal", every_steps=2))
        for _ in range(60):  # 5 MB
            busy.step(gradient(1.0))
            assert server.registry.directory is not None
            server.registry.directory.checkpointer.look()
        assert len(list((tmp_path / "data" / "log").iterdir())) <= 4


def test_a_checkpoint_waits_for_the_end_of_a_half_applied_step(
    server: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = created(client, non_finite="allow")
    session.step(gradient(1.0), overlap=True)
    served, outcome = server.registry.get(session.own_id), list[bool]()
    apply, half = served.apply, threading.Event()

    def held(*arguments: Any) -> None:
        apply(*arguments)
        if not half.is_set():
            half.set()
            saving.start()
            assert asked.wait(PATIENCE_SECONDS)

    asked, begun = threading.Event(), served.exchange._begun

    def told(*arguments: Any) -> Any:
        asked.set()
        return begun(*arguments)

    saving = threading.Thread(target=lambda: outcome.append(save(server, session) is None))
    monkeypatch.setattr(served, "apply", held)
    monkeypatch.setattr(served.exchange, "_begun", told)
    session.step(gradient(1.0), overlap=True)
    saving.join()
    assert outcome == [True]
    assert session.info().durable_step == 2


def test_a_rollback_to_a_step_has_the_loads_behind_its_checkpoint(server: Server, client: stepwire.Client) -> None:
    session = created(client)
    session.step(gradient(1.0))
    save(server, session)
    session.load({"w": np.full(SIZE, 1000.0, np.float32)})
    session.step(gradient(1.0))
    assert session.rollback(step=1)["w"][0] == 1000.0


def test_a_full_server_parks_nothing_for_an_id_that_nobody_has(tmp_path: pathlib.Path) -> None:
    with numpy_server(data_dir=str(tmp_path / "data"), max_sessions=1) as server:
        with stepwire.connect(server.target) as client:
            session = created(client)
            with pytest.raises(stepwire.SessionNotFoundError):
                client.session("0" * 32)
            assert server.registry.statistics().sessions == 1
            session.attach()
            with pytest.raises(stepwire.ResourceExhaustedError):
                created(client)
