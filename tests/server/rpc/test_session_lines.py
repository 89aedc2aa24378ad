"""The log tells of a session's life: by whom it was created, held, taken over and closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structlog.testing import capture_logs

from stepwire.v1 import optimizer_service_pb2 as pb
from tests.server.rpc.streams import Attached

PEER = "ipv4:127.0.0.1:"


def ended(lines: Sequence[Mapping[str, Any]]) -> int:
    """Count the streams that have ended."""
    return sum(line["event"] == "detached" for line in lines)


def test_a_session_is_followed_from_its_creation_to_its_end(
    serve: Any, connect: Any, make_live: Any, make_config: Any, until: Any
) -> None:
    with serve() as server, connect(server.target) as wire, capture_logs() as lines:
        created = wire.create(make_config((10,), label="nightly"), request_id="once")
        wire.create(make_config((10,), label="nightly"), request_id="once")
        live = make_live(wire, created)
        Attached(live, live.token).stream.finish()
        until(lambda: ended(lines) == 1)
        taken = Attached(live, 0)
        assert taken.step(1).result.step == 1
        wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
        until(lambda: ended(lines) == 2)
    told = sorted((line for line in lines if line.get("session_id") == live.id), key=lambda line: line["event"])
    assert all(line.pop("peer").startswith(PEER) for line in told)
    assert all((line.pop("session_id"), line.pop("log_level")) == (live.id, "info") for line in told)
    attached = {"event": "attached", "worker": 0, "transport": "tcp", "step": 0}
    assert told == [
        attached | {"acquired": False},
        attached | {"acquired": True},
        {"event": "detached", "worker": 0, "step": 0},
        {"event": "detached", "worker": 0, "step": 1},
        {"event": "session closed", "step": 1},
        {
            "event": "session created",
            "label": "nightly",
            "device": "cpu",
            "elements": 10,
            "memory_bytes": 120,
            "durability": "memory",
        },
    ]


def test_a_reason_is_told_where_there_is_one(serve: Any, connect: Any, make_live: Any, make_config: Any) -> None:
    with serve(shared_memory=False) as server, connect(server.target) as wire, capture_logs() as lines:
        live = make_live(wire, wire.create(make_config((10,))))
        Attached(live, live.token)
        Attached(live, live.token, transport="TRANSPORT_SHM")
    first, second = (line for line in lines if line["event"] == "attached")
    assert "reason" not in first
    assert (second["transport"], second["reason"]) == (
        "tcp",
        "shared memory is switched off on this server (--no-shared-memory)",
    )


def test_a_server_tells_at_its_start_what_it_is(serve: Any) -> None:
    with capture_logs() as lines, serve(shared_memory=False):
        pass
    (line,) = [line for line in lines if line["event"] == "listening"]
    assert (line["tls"], line["tokens"]) == (False, False)
    assert line["pid"] > 0
    assert line["version"].count(".") == 2
