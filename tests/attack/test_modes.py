"""Hostile requests to a server in trouble: a full disk, full memory, a drain, a lost device.

Trouble is a check inside the one chain of interceptors: a stranger is told of nothing but its missing token, another
tenant finds nothing, and no request has a status that is our bug's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import stepwire
from stepwire.connection.retry import Retry
from stepwire.errors import DataLossError, Reason
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.error_details import error_from_call
from stepwire_server.access.identity import METHODS, Role
from stepwire_server.access.tokens import TokenRecord, digest_of, new_token, write_tokens
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.durability.disk import Disk
from stepwire_server.engines import CpuEngine
from stepwire_server.server import Server
from tests.attack.hostile import Attacker

pytestmark = pytest.mark.slow

REQUESTS: Final = 60
SIZE: Final = 1000
BUDGET_BYTES: Final = 1 << 20
ZEROS: Final = {"w": np.zeros(SIZE, np.float32)}
ONES: Final = {"w": np.ones(SIZE, np.float32)}
HEALTH: Final = "/grpc.health.v1.Health/Check"
SERVICE: Final = "/stepwire.v1.OptimizerService/"
ROLES: Final = {"ann": Role.TRAINER, "bob": Role.TRAINER, "eve": Role.READER, "root": Role.ADMIN}
TENANTS: Final = {"ann": "a", "bob": "b", "eve": "b", "root": ""}


class FullDisk(Disk):
    """A disk that is full once it is told so."""

    full = False

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._check()
        return super().write(descriptor, data, offset)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._check()
        super().allocate(descriptor, nbytes)

    def make_folder(self, folder: pathlib.Path) -> None:
        self._check()
        super().make_folder(folder)

    def _check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class LostEngine(CpuEngine):
    """An engine whose device fails for good once it is told so."""

    def __init__(self) -> None:
        super().__init__(threads=1, use_numba=False)
        self.tell: Callable[[DataLossError], None] = lambda error: None
        self.error: DataLossError | None = None

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        self.tell = tell

    def allocate(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return super().allocate(*arguments)

    def lose(self) -> None:
        self.error = DataLossError("the device is lost; connect again once a server runs", reason=Reason.DEVICE_LOST)
        self.tell(self.error)


class Trouble(NamedTuple):
    """A mode of a server.

    Attributes:
        begin: brings the server, with its disk and its engine, into the mode.
        shown: the victim's call that is told of it.
        reason: the reason that it is told.
    """

    begin: Callable[[Server, FullDisk, LostEngine], object]
    shown: Callable[[stepwire.Client, Any], object]
    reason: Reason


def full_memory(server: Server, disk: FullDisk, engine: LostEngine) -> None:
    budget = server.registry.pool.choose("").budget
    budget.reserve(budget.limit_bytes - budget.reserved_bytes, "a test")


MODES: Final = {
    "full disk": Trouble(
        lambda server, disk, engine: setattr(disk, "full", True),
        lambda client, session: session.save_checkpoint("best"),
        Reason.DURABILITY_FAILED,
    ),
    "full memory": Trouble(full_memory, lambda client, session: client.create_session(ZEROS), Reason.MEMORY_EXHAUSTED),
    "draining": Trouble(
        lambda server, disk, engine: server.drain(), lambda client, session: session.step(ONES), Reason.SHUTTING_DOWN
    ),
    "degraded": Trouble(
        lambda server, disk, engine: engine.lose(),
        lambda client, session: client.create_session(ZEROS),
        Reason.DEVICE_LOST,
    ),
}


class Troubled(NamedTuple):
    """A server in trouble, with its tokens and the victim's session."""

    server: Server
    tokens: dict[str, str]
    client: stepwire.Client
    session: Any


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Trouble:
    return MODES[request.param]


@pytest.fixture
def troubled(tmp_path: pathlib.Path, mode: Trouble) -> Iterator[Troubled]:
    tokens = {name: new_token() for name in ROLES}
    records = [
        TokenRecord(name=name, digest=digest_of(token), role=ROLES[name], tenant=TENANTS[name])
        for name, token in tokens.items()
    ]
    write_tokens(tmp_path / "tokens", records)
    disk, engine = FullDisk(), LostEngine()
    config = ServerConfig(
        bind="127.0.0.1:0",
        device="cpu",
        tokens=str(tmp_path / "tokens"),
        data_dir=str(tmp_path / "data"),
        journal_segment_bytes=1 << 20,
        sweep_seconds=3600.0,
        drain_seconds=0.5,
    )
    impatient = Retry(sleep=lambda seconds: None, uniform=lambda low, high: 0.0)
    with (
        Server(config, pool=DevicePool.of([engine], BUDGET_BYTES), disk=disk) as server,
        contextlib.closing(
            stepwire.connect(server.target, token=tokens["ann"], transport="tcp", timeout=5.0, retry=impatient)
        ) as client,
    ):
        session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0), durability="journal", keep=True)
        session.step(ONES)
        mode.begin(server, disk, engine)
        yield Troubled(server, tokens, client, session)
        disk.full = False


def status(channel: grpc.Channel, method: str, token: str, request: Any) -> tuple[str, str]:
    """Return the code and the reason of a call that is refused."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = channel.stream_stream(method)(iter([request.SerializeToString()]), timeout=120.0, metadata=metadata)
    with pytest.raises(grpc.RpcError) as refused:
        list(call)
    return refused.value.code().name, str(error_from_call(refused.value).reason)


def test_trouble_opens_no_other_way_in(troubled: Troubled, mode: Trouble) -> None:
    server, tokens, client, session = troubled
    session_id = session.session_id
    with grpc.insecure_channel(server.target) as channel:
        strangers = {
            status(channel, method, token, pb.GetServerInfoRequest())
            for method in METHODS
            if method.startswith(SERVICE)
            for token in ("", "x", new_token())
        }
        assert strangers == {("UNAUTHENTICATED", "UNAUTHENTICATED")}
        forbidden = status(channel, f"{SERVICE}CreateSession", tokens["eve"], pb.CreateSessionRequest())
        assert forbidden[0] == "PERMISSION_DENIED"
        for name, kind in (("GetSession", pb.GetSessionRequest), ("Pull", pb.PullRequest), ("Step", pb.StepRequest)):
            found = {
                status(channel, SERVICE + name, tokens["bob"], kind(session_id=each)) for each in (session_id, "0" * 32)
            }
            assert len(found) == 1, "another tenant's session is like one that never was"
            assert found & {("NOT_FOUND", "SESSION_NOT_FOUND"), ("UNAVAILABLE", "SHUTTING_DOWN")}
        calling = (tokens["bob"], tokens["bob"], tokens["eve"], new_token(), "")
        attacker = Attacker(channel, 7, session_id, calling)
        for _ in range(REQUESTS):
            attacker.attack()
        assert attacker.wrong == []
        assert attacker.statuses.keys() >= {"UNAUTHENTICATED", "PERMISSION_DENIED"}
        health = channel.unary_unary(HEALTH)(b"", timeout=120.0)
        assert health_pb2.HealthCheckResponse.FromString(health).status > 0
    with pytest.raises(stepwire.StepwireError) as told:
        mode.shown(client, session)
    assert told.value.reason is mode.reason
    np.testing.assert_array_equal(client.session(session_id).pull()["w"], -1.0)
    with stepwire.connect(server.target, token=tokens["root"]) as admin:
        assert session_id in {each.session_id for each in admin.sessions()}
        other = admin.session(session_id)
        if mode.reason is not Reason.DURABILITY_FAILED:  # the end of a durable session is a record too
            other.close()
            assert session_id not in {each.session_id for each in admin.sessions()}
