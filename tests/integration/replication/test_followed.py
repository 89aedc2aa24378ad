"""Sessions of every kind are followed: tables by rows, several workers, loads; and by those alone who may."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
from stepwire import Rows
from stepwire.v1 import replication_service_pb2 as pb
from stepwire.wire.error_details import error_from_call
from stepwire_server.access.identity import Role
from stepwire_server.access.tokens import TokenRecord, digest_of, new_token, write_tokens
from stepwire_server.server import Server
from tests.integration.replication.pair import START, Pair, gradient, pair_in
from tests.integration.workers.together import joined, together
from tests.server.cli.outcome import Outcome
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

TABLES = {"table": "torch_sparse"}
PARAMETERS = {"table": np.ones((8, 2), np.float32), "w": np.ones(3, np.float32)}


def rows(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    numbers = rng.integers(0, 8, 5)
    values = rng.standard_normal((5, 2)).astype(np.float32)
    return {"table": Rows(numbers, values), "w": rng.standard_normal(3).astype(np.float32)}


def is_alike(pair: Pair) -> bool:
    """Tell whether the standby has what the primary has, by digests."""
    before = pair.speaker.divergences
    pair.upkeep.compare()
    pair.speaker.is_owner()  # a round trip behind the digests
    return pair.speaker.divergences == before


def test_tables_and_loads_are_followed(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = client.create_session(
            PARAMETERS, tables=TABLES, optimizer=stepwire.Adam(lr=0.1), durability="replicated"
        )
        for step in range(2):
            session.step(rows(step))
        assert is_alike(pair)
        (replica,) = pair.speaker.replicas.values()
        replica.failed("as if it were lost", 0.0)
        pair.upkeep.look()  # it is brought whole, with the numbers of its rows
        session.step(rows(2))
        session.load({"w": np.zeros(3, np.float32), "table": np.ones((8, 2), np.float32)})
        session.load_rows({"table": Rows([7, 2], np.full((2, 2), 3.0, np.float32))})
        session.step(rows(3))
        assert is_alike(pair)
        expected = session.pull()
        pair.standby.replication.promote()
        assert {name: value.tobytes() for name, value in session.pull().items()} == {
            name: value.tobytes() for name, value in expected.items()
        }


def test_rounds_of_several_workers_are_followed(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:
        options: dict[str, Any] = {
            "aggregation": stepwire.Aggregation(workers=2),
            "durability": "replicated",
            "request_id": "job",
            "optimizer": stepwire.SGD(lr=0.5),
        }
        sessions = [joined(pair.primary.target, START, worker, **options) for worker in range(2)]
        for step in range(2):
            together(*(lambda s=session, k=step: s.step(gradient(k)) for session in sessions))
        assert is_alike(pair)
        assert pair.standby.replication.promote()[1] == 1


def tokens_in(folder: pathlib.Path) -> dict[str, str]:
    """Write a file of tokens, one of each kind, and return them by name."""
    made = {name: new_token() for name in ("trainer", "standby", "admin", "tenant")}
    roles = {"trainer": Role.TRAINER, "standby": Role.STANDBY, "admin": Role.ADMIN, "tenant": Role.ADMIN}
    records = [
        TokenRecord(name=name, digest=digest_of(token), role=roles[name], tenant="lab" if name == "tenant" else "")
        for name, token in made.items()
    ]
    write_tokens(folder / "tokens", records)
    (folder / "standby").write_text(made["standby"])
    return made


def asked(server: Server, method: str, request: Any, token: str) -> Any:
    with grpc.insecure_channel(server.target) as channel:
        call: Any = channel.unary_unary(f"/stepwire.v1.ReplicationService/{method}")
        return call(request.SerializeToString(), metadata=(("authorization", f"Bearer {token}"),))


def test_a_standby_shows_a_token_and_others_may_not_follow_or_promote(tmp_path: pathlib.Path) -> None:
    tokens = tokens_in(tmp_path)
    settings = {"tokens": str(tmp_path / "tokens")}
    with numpy_server(standby="required", **settings) as primary:
        with numpy_server(standby_of=primary.target, standby_token=str(tmp_path / "standby"), **settings) as standby:
            speaker = primary.replication.following()[0]
            with speaker.outbox.changed:
                assert speaker.outbox.changed.wait_for(lambda: speaker.is_member, 120.0)
            for name in ("trainer", "standby", "tenant"):
                with pytest.raises(grpc.RpcError) as refused:
                    asked(standby, "Promote", pb.PromoteRequest(), tokens[name])
                assert isinstance(error_from_call(refused.value), stepwire.PermissionDeniedError), name
            with grpc.insecure_channel(primary.target) as channel:
                follow: Any = channel.stream_stream("/stepwire.v1.ReplicationService/Follow")
                opening = pb.FollowRequest(open=pb.FollowOpen(standby_id="x")).SerializeToString()
                for name in ("trainer", "tenant"):
                    with pytest.raises(grpc.RpcError) as refused:
                        next(follow(iter([opening]), metadata=(("authorization", f"Bearer {tokens[name]}"),)))
                    assert isinstance(error_from_call(refused.value), stepwire.PermissionDeniedError), name
            done = pb.PromoteResponse.FromString(asked(standby, "Promote", pb.PromoteRequest(), tokens["admin"]))
            assert (done.epoch, done.sessions) == (3, 0)


def test_commands_tell_and_change_how_a_pair_stands(command: Any, tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:

        def run(name: str, target: str, *more: str) -> Outcome:
            return command("standby", name, "-t", target, *more)  # type: ignore[no-any-return]

        code, out, _ = run("status", pair.primary.target, "--json")
        assert (code, json.loads(out)["role"], json.loads(out)["in_sync"]) == (0, "primary", True)
        code, out, _ = run("status", pair.standby.target)
        assert (code, "standby of epoch 2" in out) == (0, True)
        code, out, _ = command("health", "-t", pair.standby.target)
        assert (code, "not serving, " in out, "this server is a standby: use its primary" in out) == (1, True, True)
        assert command("health", "-t", pair.primary.target).code == 0
        code, _, err = run("promote", pair.primary.target)
        assert (code, "no standby, but the primary; name its standby" in err) == (2, True)
        code, out, _ = run("promote", pair.standby.target, "--json")
        assert (code, json.loads(out)) == (0, {"epoch": 3, "sessions": 0})
        assert run("promote", pair.standby.target, "--json").out == out, "it may be repeated"
        code, out, _ = run("forget", pair.standby.target)
        assert (code, out) == (0, "no standby was known\n")
        code, _, err = command("standby", "disown", str(tmp_path), "a")
        assert (code, f"at {pair.standby.target}" in err) == (2, True)
        code, out, _ = command("standby", "disown", str(tmp_path), "a", "--yes")
        assert (code, out.startswith("gave up the sessions of a")) == (0, True)
        assert command("standby", "disown", str(tmp_path), "a").out == "nobody speaks for a\n"


def test_settings_that_contradict_are_refused(tmp_path: pathlib.Path) -> None:
    for settings, problem in (
        ({"standby": "required", "data_dir": str(tmp_path)}, "on a disk or with a standby, not both"),
        ({"standby": "preferred"}, "to go on alone is a claim in the directory"),
        ({"standby_token": "x"}, "needs --standby-of"),
        ({"standby_of": "10.0.0.1:1", "standby_token": "x"}, "would travel in the clear"),
        ({"standby_of": "127.0.0.1:1", "standby_ca": str(tmp_path / "none")}, "cannot be read"),
    ):
        with pytest.raises(stepwire.InvalidRequestError, match=problem), numpy_server(**settings):
            pass
    with numpy_server() as server, stepwire.connect(server.target) as client:
        with pytest.raises(stepwire.UnsupportedFeatureError, match="accepts no standby; start it with --standby"):
            client.create_session(START, durability="replicated")
