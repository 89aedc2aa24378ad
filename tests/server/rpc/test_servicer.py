"""The servicer's own part: the server's description of itself, and pages."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN, __version__
from stepwire_server.devices.pool import DevicePool
from stepwire_server.rpc.features import SERVED_FEATURES
from tests.server.pretended_engine import PretendedEngine


def test_a_server_tells_its_limits(serve: Any, connect: Any) -> None:
    settings = {
        "max_sessions": 5,
        "max_tensors": 6,
        "max_chunk_bytes": 70_000,
        "max_streams": 7,
        "max_lease_seconds": 8.5,
        "step_idle_seconds": 9.5,
    }
    with serve(**settings, memory_budget=12345) as server, connect(server.target) as wire:
        info = wire.info()
    expected = {name: value for name, value in settings.items() if "seconds" not in name} | {
        "max_unary_bytes": 70_000,
        "max_lease": Duration(seconds=8, nanos=500_000_000),
        "step_idle": Duration(seconds=9, nanos=500_000_000),
    }
    assert {field.name: value for field, value in info.limits.ListFields()} == expected
    assert (info.version, info.protocol_min, info.protocol_max) == (__version__, PROTOCOL_MIN, PROTOCOL_MAX)
    (device,) = info.devices
    assert (device.name, device.budget_bytes, device.reserved_bytes) == ("cpu", 12345, 0)
    assert device.memory_bytes > 1 << 20
    assert (info.sessions, info.draining) == (0, False)


def test_without_a_budget_it_is_four_fifths_of_the_memory(serve: Any, connect: Any) -> None:
    with serve() as server, connect(server.target) as wire:
        (device,) = wire.info().devices
    assert device.budget_bytes == int(device.memory_bytes * 0.8)


def test_every_device_is_told_with_a_budget_of_its_own(serve: Any, connect: Any, make_config: Any) -> None:
    pool = DevicePool.of([PretendedEngine("cuda:0"), PretendedEngine("cuda:1", memory_bytes=1 << 20)], 12345)
    with serve(pool=pool) as server, connect(server.target) as wire:
        session = wire.create(make_config((10,), device="cuda:1")).session
        info = wire.info()
        listed = pb.ListSessionsResponse.FromString(wire.unary("ListSessions", pb.ListSessionsRequest())).sessions
    assert [(device.name, device.budget_bytes, device.reserved_bytes) for device in info.devices] == [
        ("cuda:0", 12345, 0),
        ("cuda:1", 12345, 120),
    ]
    assert [(device.description, device.memory_bytes) for device in info.devices] == [
        ("Pretended cuda:0", 1 << 30),
        ("Pretended cuda:1", 1 << 20),
    ]
    assert tuple(info.features) == tuple(name for name in SERVED_FEATURES if not name.startswith("durability_"))
    assert (info.sessions, session.device, session.config.device) == (1, "cuda:1", "cuda:1")
    assert [entry.device for entry in listed] == ["cuda:1"]


def test_sessions_on_two_devices_step_side_by_side(
    serve: Any, connect: Any, make_config: Any, make_live: Any, refusal: Any
) -> None:
    pool = DevicePool.of([PretendedEngine("cuda:0"), PretendedEngine("cuda:1")], 400)
    with serve(pool=pool) as server, connect(server.target) as wire:
        one, other = (make_live(wire, wire.create(make_config((10,)))) for _ in range(2))
        assert [wire.get(live.id).device for live in (one, other)] == ["cuda:0", "cuda:1"]
        for step in (1, 2):
            one.step(step)
            other.step(step)
        assert one.fingerprint()[2] == other.fingerprint()[2]
        refusal(
            lambda: wire.create(make_config((10,), device="cuda:2")),
            "FAILED_PRECONDITION",
            "UNSUPPORTED_FEATURE",
            "cuda:0, cuda:1",
        )


def test_each_start_of_a_server_has_an_id_of_its_own(serve: Any, connect: Any) -> None:
    ids = set()
    for _ in range(2):
        with serve() as server, connect(server.target) as wire:
            ids |= {wire.info().instance_id, wire.info().instance_id}
    assert len(ids) == 2


@pytest.mark.parametrize(("asked", "size"), [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (2**32 - 1, 1000)])
def test_pages_have_a_default_and_a_limit(
    server: Any, wire: Any, monkeypatch: pytest.MonkeyPatch, asked: int, size: int
) -> None:
    seen: list[tuple[str, int]] = []

    def page(after: str, size: int, tenant: str | None) -> tuple[list[Any], str]:
        assert tenant is None
        seen.append((after, size))
        return [], "f" * 32

    monkeypatch.setattr(server.registry, "page", page)
    request = pb.ListSessionsRequest(page_size=asked, page_token="0" * 32)
    answer = pb.ListSessionsResponse.FromString(wire.unary("ListSessions", request))
    assert seen == [("0" * 32, size)]
    assert answer == pb.ListSessionsResponse(next_page_token="f" * 32)


def test_a_draining_server_says_so_and_takes_nothing_new(
    serve: Any, connect: Any, make_live: Any, make_config: Any, refusal: Any
) -> None:
    with serve() as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((3,))))
        live.step(1)
        before = live.fingerprint()
        assert server.drain() is True
        assert wire.info().draining
        for call in (
            lambda: live.step(2),
            lambda: wire.unary("Step", live.unary_step(2)),
            lambda: wire.create(make_config((3,))),
            lambda: live.load(live.load_opening(1), live.load_chunk(commit=True)),
        ):
            refused = refusal(call, "UNAVAILABLE", "SHUTTING_DOWN", "shutting down")
            assert refused.retry_after == 1.0
        assert live.fingerprint() == before, "state can still be pulled"
        assert pb.DeleteSessionResponse.FromString(
            wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
        ) == pb.DeleteSessionResponse(applied_step=1)


def test_a_created_session_is_told_whole_and_a_listed_one_in_short(live: Any) -> None:
    session = live.wire.get(live.id)
    assert [tensor.name for tensor in session.config.tensors] == ["t0", "t1", "last"]
    assert (len(session.config.groups), session.layout.size) == (2, 263)
    listed = pb.ListSessionsResponse.FromString(live.wire.unary("ListSessions", pb.ListSessionsRequest(page_size=1000)))
    (short,) = [entry for entry in listed.sessions if entry.session_id == live.id]
    for field in ("tensors", "groups"):
        session.config.ClearField(field)
    session.ClearField("layout")
    for message in (session, short):
        message.ClearField("create_time")
        message.ClearField("expire_time")
        message.ClearField("attached")
        message.ClearField("idle")
    assert short == session


def test_a_repeated_creation_says_so(wire: Any, make_config: Any) -> None:
    answers = [wire.create(make_config((3,)), request_id="again-and-again") for _ in range(3)]
    assert [answer.replayed for answer in answers] == [False, True, True]
    assert {answer.session.session_id for answer in answers} == {answers[0].session.session_id}
    assert len({answer.attach_token for answer in answers}) == 1


def test_only_grpcs_services_that_are_meant_are_served(server: Any, wire: Any, refusal: Any) -> None:
    """Facts, attack 15: no reflection, no channelz; health is there."""
    import grpc

    for path in (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetTopChannels",
    ):
        with pytest.raises(grpc.RpcError) as failed:
            list(wire._channel.stream_stream(path)(iter([b""])))
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    (answer,) = wire._channel.stream_stream("/grpc.health.v1.Health/Check")(iter([b""]))
    assert answer == b"\x08\x01"
