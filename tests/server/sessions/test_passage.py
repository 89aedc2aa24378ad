"""The rest of a session for a move, its end there, and the state that comes into a new one: over generated code."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
from stepwire.v1 import move_pb2, optimizer_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from stepwire.wire.error_details import error_from_call
from stepwire.wire.messages import duration_to_wire
from stepwire_server.config import ServerConfig
from stepwire_server.durability.disk import Disk
from stepwire_server.server import Server
from stepwire_server.sessions.attach_tokens import KEY_BYTES, AttachTokens
from stepwire_server.sessions.tenants import TenantSessions
from tests.integration.probes import half_applied
from tests.support.numpy_server import numpy_pool, numpy_server
from tests.support.raw import RawClient, Refused, step_message

WEIGHTS = {"w": np.ones(8, np.float32)}
GRADIENT = {"w": np.full(8, 0.5, np.float32)}
KEY = bytes(range(KEY_BYTES))
SHARDS = [move_pb2.SuccessorShard(session_id="f" * 32, target="elsewhere:1", attach_key=KEY)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[Server]:
    with numpy_server(clock=clock) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    """A client that repeats nothing: whatever is refused shows at once."""
    with stepwire.connect(server.target, transport="tcp", retry=stepwire.Retry(uniform=lambda *_: 3600.0)) as client:
        yield client


class Mover:
    """The calls of a mover, each made once."""

    def __init__(self, stub: Any, session: stepwire.Session) -> None:
        self._stub, self.session_id = stub, session.own_id

    def freeze(self, move_id: str = "one", last: int = 0, seconds: float = 10.0) -> tuple[int, int, int]:
        request = pb.FreezeSessionRequest(session_id=self.session_id, move_id=move_id, last_step=last)
        request.lease.CopyFrom(duration_to_wire(seconds))
        found = self._stub.FreezeSession(request)
        return found.applied_step, found.last_step, found.applied_load

    def thaw(self, move_id: str = "one") -> None:
        self._stub.ThawSession(pb.ThawSessionRequest(session_id=self.session_id, move_id=move_id))

    def look(self) -> Any:
        return self._stub.GetSession(pb.GetSessionRequest(session_id=self.session_id))

    def export(self, move_id: str = "one") -> list[Any]:
        return list(self._stub.ExportSession(pb.ExportSessionRequest(session_id=self.session_id, move_id=move_id)))

    def hand_over(self, shards: Sequence[Any] = SHARDS, **fields: Any) -> bool:
        numbers = {"move_id": "one", "step": 1, "load": 1, "epoch": 1} | fields
        request = pb.HandOverSessionRequest(session_id=self.session_id, **numbers)
        request.successor.shards.extend(shards)
        return bool(self._stub.HandOverSession(request).replayed)

    def successor(self, token: int = 0) -> list[int]:
        found = self._stub.GetSuccessor(pb.GetSuccessorRequest(session_id=self.session_id, attach_token=token))
        return [shard.attach_token for shard in found.successor.shards]


@pytest.fixture
def session(client: stepwire.Client) -> stepwire.Session:
    """A session at step 1."""
    session = client.create_session(WEIGHTS, keep=True)
    session.step(GRADIENT)
    return session


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield OptimizerServiceStub(channel)


@pytest.fixture
def mover(stub: Any, session: stepwire.Session) -> Mover:
    return Mover(stub, session)


def refusal(call: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call(*arguments, **options)
    return error_from_call(refused.value).reason, str(error_from_call(refused.value))


def test_a_frozen_session_admits_steps_to_a_number_and_no_load(mover: Mover, session: stepwire.Session) -> None:
    assert mover.freeze(last=2) == (1, 2, 1)
    session.step(GRADIENT)
    with pytest.raises(stepwire.UnavailableError, match="admitted no step beyond 2") as refused:
        session.step(GRADIENT)
    assert (refused.value.reason, refused.value.metadata["step"]) == (stepwire.Reason.SESSION_MOVING, "3")
    with pytest.raises(stepwire.UnavailableError, match="admitted no load"):
        session.load(WEIGHTS)
    assert session.pull()["w"].shape == (8,)
    assert mover.freeze() == (2, 2, 1)
    mover.thaw("another")
    with pytest.raises(stepwire.UnavailableError):
        session.step(GRADIENT)
    mover.thaw()
    session.step(GRADIENT)
    assert session.applied_step == 3


def test_a_freeze_ends_by_itself_and_is_renewed(mover: Mover, session: stepwire.Session, clock: Clock) -> None:
    mover.freeze()
    clock.now = 9.0
    mover.freeze()
    clock.now = 18.9
    with pytest.raises(stepwire.UnavailableError):
        session.step(GRADIENT)
    clock.now = 19.0
    session.step(GRADIENT)
    assert session.applied_step == 2
    assert "does not rest" in refusal(mover.export)[1]


def test_the_newest_move_counts(mover: Mover) -> None:
    mover.freeze("one")
    mover.freeze("two")
    assert refusal(mover.hand_over, move_id="one")[0] == "STATE_CHANGED"
    assert mover.hand_over(move_id="two") is False


@pytest.mark.parametrize("other", [{"step": 0}, {"load": 2}, {"epoch": 2}])
def test_a_session_leaves_at_the_moment_that_was_exported_alone(
    mover: Mover, session: stepwire.Session, other: dict[str, int]
) -> None:
    mover.freeze()
    assert refusal(mover.hand_over, **other)[0] == "STATE_CHANGED"
    mover.thaw()
    session.step(GRADIENT)
    assert session.applied_step == 2


def test_a_session_that_has_left_tells_where_it_is(mover: Mover, session: stepwire.Session, server: Server) -> None:
    token = session._link.shards[0].hold.token
    mover.freeze()
    assert mover.successor(token) == []
    assert mover.hand_over() is False
    assert mover.hand_over() is True
    assert refusal(mover.hand_over, move_id="another")[0] == "SESSION_MOVED"
    for call in (mover.freeze, mover.export, mover.look):
        assert refusal(call)[0] == "SESSION_MOVED"
    assert mover.successor() == [0]
    tokens = AttachTokens()
    tokens.adopt(KEY)
    assert mover.successor(token) == [tokens.token(0, 1)]
    assert refusal(mover.successor, token + 1)[0] == "FENCED"
    assert server.registry.statistics().sessions == 0
    assert server.registry.statistics().reserved_bytes == 0


def test_a_shard_follows_the_first_ones_decision_without_a_rest(mover: Mover) -> None:
    assert refusal(mover.hand_over)[0] == "STATE_CHANGED"
    assert refusal(mover.hand_over, shards=())[0] == "INVALID_CONFIG"
    wrong = move_pb2.SuccessorShard(session_id="f" * 32, target="elsewhere:1", attach_key=KEY[1:])
    assert "shards[0].attach_key: 15 bytes; it has 16" in refusal(mover.hand_over, shards=[wrong])[1]
    assert mover.hand_over(decided=True) is False


def test_wrong_requests_are_refused_by_name(mover: Mover) -> None:
    assert refusal(mover.freeze, "no/name") == (
        "INVALID_CONFIG",
        "move_id: 'no/name' is not 1 to 64 characters of [A-Za-z0-9._-]",
    )
    for seconds in (0.0, 601.0):
        assert "is not in (0, 600]" in refusal(mover.freeze, seconds=seconds)[1]


class Import:
    """A state on its way into a new session of one tensor of eight elements."""

    def __init__(self, stub: Any, raw: RawClient) -> None:
        self._stub = stub
        self.created = raw.create(8, zeros=False)
        self.session_id = self.created.session.session_id

    def send(self, messages: Sequence[Any], token: int | None = None) -> int:
        """Send what a session has exported, and return the step that the new one is at."""
        token = self.created.attach_token if token is None else token
        opening = move_pb2.ImportOpen(session_id=self.session_id, attach_token=token)
        sent = [pb.ImportSessionRequest(open=opening)]
        for each in messages:
            if each.HasField("numbers"):
                sent.append(pb.ImportSessionRequest(numbers=each.numbers))
            else:
                sent.append(pb.ImportSessionRequest(slot=each.slot, chunk=each.chunk, payload=each.payload))
        response = self._stub.ImportSession(iter(sent))
        assert len(response.attach_key) == KEY_BYTES
        return int(response.applied_step)


@pytest.fixture
def exported(mover: Mover) -> list[Any]:
    mover.freeze()
    return mover.export()


@pytest.fixture
def new(stub: Any, server: Server) -> Iterator[Import]:
    with RawClient(server.target) as raw:
        yield Import(stub, raw)


def test_a_state_is_the_same_where_it_comes(
    exported: list[Any], new: Import, client: stepwire.Client, session: stepwire.Session
) -> None:
    assert new.send(exported) == 1
    found = client.session(new.session_id)
    assert found.applied_step == 1
    for slot, values in session.state().slots.items():
        assert values["w"].tobytes() == found.state().slots[slot]["w"].tobytes()
    assert found.state().tensor_steps == {"w": 1}
    assert refusal(new.send, exported)[0] == "STREAM_DISPLACED"  # the state came with a hold of its own


def test_a_state_that_is_not_whole_is_refused(exported: list[Any], new: Import) -> None:
    *blocks, numbers = exported
    assert refusal(new.send, blocks) == ("INVALID_FRAME", "numbers: the stream ended before `numbers`; end the session")
    assert "8 elements of 'param' were not sent" in refusal(new.send, exported[1:])[1]
    assert "'param' came twice" in refusal(new.send, [blocks[0], *exported])[1]
    beyond = pb.ExportSessionResponse(slot="param", chunk=tensor_pb2.Chunk(offset=5, count=8), payload=bytes(32))
    assert "is no part of [0, 8)" in refusal(new.send, [beyond])[1]
    unknown = pb.ExportSessionResponse(slot="x", chunk=tensor_pb2.Chunk(offset=0, count=8), payload=bytes(32))
    assert "'x' is unknown" in refusal(new.send, [unknown])[1]
    assert refusal(new.send, exported, token=1)[0] == "FENCED"
    assert new.send(exported) == 1  # nothing of all that counts


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tensor_steps": [1, 1]}, "tensor_steps"),
        ({"tensor_scalars": [0.5]}, "tensor_scalars"),
        ({"step": 2**53}, "step"),
        ({"sum_bound": -1.0}, "sum_bound"),
        ({"sum_bound": math.nan}, "sum_bound"),
        ({"loss_scale": optimizer_pb2.LossScaleState(scale=1.0)}, "loss_scale"),
        ({"step": 3}, "last_result"),
        ({"workers": [move_pb2.WorkerNumbers()]}, "workers[0].worker"),
    ],
)
def test_numbers_of_another_session_are_refused(
    exported: list[Any], new: Import, change: dict[str, Any], field: str
) -> None:
    *blocks, numbers = exported
    numbers.numbers.ClearField(next(iter(change)))
    numbers.numbers.MergeFrom(move_pb2.StateNumbers(**change))
    assert refusal(new.send, [*blocks, numbers])[1].startswith(f"numbers.{field}: ")


class Doubtful(Disk):
    """A disk that cannot say whether a record of a move has reached it."""

    fails = True

    def sync_folder(self, folder: pathlib.Path) -> None:
        if self.fails and folder.name == "moved":
            raise OSError("the disk does not answer")
        super().sync_folder(folder)


def served(folder: pathlib.Path, clock: Clock, disk: Disk) -> Server:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0, data_dir=str(folder))
    return Server(config, clock=clock, pool=numpy_pool(), disk=disk)


def test_a_session_rests_while_nobody_knows_of_its_record(tmp_path: pathlib.Path, clock: Clock) -> None:
    disk = Doubtful()
    with served(tmp_path, clock, disk) as server, grpc.insecure_channel(server.target) as channel:
        retry = stepwire.Retry(uniform=lambda *_: 3600.0)
        with stepwire.connect(server.target, transport="tcp", retry=retry) as client:
            session = client.create_session(WEIGHTS, keep=True, durability="journal")
            session.step(GRADIENT)
            mover = Mover(OptimizerServiceStub(channel), session)
            mover.freeze()
            assert refusal(mover.hand_over)[0] == "DURABILITY_FAILED"
            clock.now = 1e6
            mover.thaw()
            with pytest.raises(stepwire.UnavailableError, match="is moving to other servers"):
                session.step(GRADIENT)
            assert refusal(mover.hand_over, shards=[*SHARDS, *SHARDS])[0] == "DURABILITY_FAILED"
            disk.fails = False
            assert mover.hand_over() is False
            assert mover.successor() == [0]


def test_the_next_server_finds_a_record_that_nobody_knew_of(tmp_path: pathlib.Path, clock: Clock) -> None:
    with served(tmp_path, clock, Doubtful()) as server, grpc.insecure_channel(server.target) as channel:
        with stepwire.connect(server.target, transport="tcp") as client:
            session = client.create_session(WEIGHTS, keep=True, durability="journal")
            session.step(GRADIENT)
            mover = Mover(OptimizerServiceStub(channel), session)
            mover.freeze()
            assert refusal(mover.hand_over)[0] == "DURABILITY_FAILED"
    with served(tmp_path, clock, Disk()) as server, stepwire.connect(server.target) as client:
        with grpc.insecure_channel(server.target) as channel:
            assert refusal(Mover(OptimizerServiceStub(channel), session).look)[0] == "SESSION_MOVED"
        assert list(client.sessions()) == []
    (record,) = (tmp_path / "moved").iterdir()
    record.write_bytes(record.read_bytes().replace(b"elsewhere", b"elsewhen_"))
    with pytest.raises(stepwire.DataLossError, match="describes no session that has moved: its checksum"):
        served(tmp_path, clock, Disk())


def test_another_tenant_is_told_nothing_of_a_session_that_has_left(
    mover: Mover, session: stepwire.Session, server: Server
) -> None:
    mover.freeze()
    server.registry.get(session.own_id).request_id = "ann/job"
    mover.hand_over()
    assert TenantSessions(server.registry, "ann").check(session.own_id) == session.own_id
    for tenant in ("bob", ""):
        with pytest.raises(stepwire.SessionNotFoundError):
            TenantSessions(server.registry, tenant).check(session.own_id)
    with pytest.raises(stepwire.SessionMovedError):
        server.registry.created("ann/job")
    assert server.registry.created("bob/job") is None


def test_a_step_that_is_half_applied_is_finished_before_the_rest(
    stub: Any, server: Server, client: stepwire.Client
) -> None:
    weights = {"w": np.ones(100, np.float32)}
    session = client.create_session(weights, non_finite="allow", keep=True)
    mover = Mover(stub, session)
    with RawClient(server.target) as raw:
        half_applied(server.registry, raw, session.session_id)
        assert mover.freeze() == (0, 1, 1)
        assert "does not rest" in refusal(mover.export)[1]
        stream = raw.attach(session.session_id)
        assert stream.receive() is not None
        message = step_message(1, np.ones(100, np.float32))
        message.begin.overlap = True
        assert stream.step(message).step == 1
        assert mover.freeze() == (1, 1, 1)
        assert mover.export()[-1].numbers.step == 1
        with pytest.raises(Refused) as refused:
            stream.step(step_message(2, np.ones(100, np.float32)))
        assert refused.value.row == ("UNAVAILABLE", "SESSION_MOVING")


@pytest.mark.parametrize(
    ("feature", "options"),
    [
        ("row_ids", {"parameters": {"t": stepwire.Table((16, 4), "torch_sparse", hashed=True)}}),
        ("durability_replicated", {"durability": "replicated"}),
    ],
)
def test_sessions_that_cannot_be_moved_are_refused_by_name(feature: str, options: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        if feature == "durability_replicated":
            served = stack.enter_context(numpy_server(standby="required"))
            stack.enter_context(numpy_server(standby_of=served.target))
        else:
            served = stack.enter_context(numpy_server())
        client = stack.enter_context(stepwire.connect(served.target))
        session = client.create_session(**{"parameters": WEIGHTS, "keep": True} | options)
        channel = stack.enter_context(grpc.insecure_channel(served.target))
        with pytest.raises(grpc.RpcError) as refused:
            Mover(OptimizerServiceStub(channel), session).freeze()
        error = error_from_call(refused.value)
        assert (error.reason, error.metadata["feature"]) == ("UNSUPPORTED_FEATURE", feature)
        assert "cannot be moved to other servers" in str(error)
