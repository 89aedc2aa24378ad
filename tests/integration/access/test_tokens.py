"""Tokens, roles and tenants over a real server: who may do what, and what nobody else learns."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import stepwire
from stepwire_server.access.identity import Role
from stepwire_server.cli.main import app
from stepwire_server.server import Server
from tests.integration.access.conftest import Tokens
from tests.support.numpy_server import numpy_server

ZEROS = {"w": np.zeros(4, np.float32)}
ONES = {"w": np.ones(4, np.float32)}


@pytest.fixture
def server(tokens: Tokens, tmp_path: pathlib.Path) -> Iterator[Server]:
    with numpy_server(tokens=str(tokens.path), data_dir=str(tmp_path / "data")) as running:
        yield running


def connected(server: Server, token: str, **options: Any) -> stepwire.Client:
    return stepwire.connect(server.target, token=token, **options)


def look(server: Server) -> None:
    """Have the server read its tokens, as its sweep does."""
    server.access.look()


def test_who_has_no_token_is_told_what_to_do(server: Server, tokens: Tokens) -> None:
    with stepwire.connect(server.target) as client:
        with pytest.raises(stepwire.AuthenticationError, match=r"connect\(token=…\), STEPWIRE_TOKEN"):
            client.info()
        with pytest.raises(stepwire.AuthenticationError):
            client.create_session(ZEROS)
    with connected(server, "sw_unknown") as client, pytest.raises(stepwire.AuthenticationError, match="unknown here"):
        client.info()


def test_the_environment_has_tokens_too(server: Server, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tokens.add("ann")
    look(server)
    monkeypatch.setenv("STEPWIRE_TOKEN", token)
    with stepwire.connect(server.target) as client:
        assert client.info().sessions == 0
    monkeypatch.delenv("STEPWIRE_TOKEN")
    file = tokens.path.with_name("token")
    file.write_text(f"{token}\n")
    monkeypatch.setenv("STEPWIRE_TOKEN_FILE", str(file))
    with stepwire.connect(server.target) as client:
        assert client.info().sessions == 0


def test_memory_is_handed_to_the_identity_that_attached(server: Server, tokens: Tokens) -> None:
    token = tokens.add("ann")
    look(server)
    with connected(server, token, transport="shm") as client:
        session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0))
        np.testing.assert_array_equal(session.step(ONES)["w"], -1.0)
        assert session.transport.name == "shm"


def test_a_tenants_bytes_on_disk_have_a_limit_that_parked_sessions_count_in(
    tokens: Tokens, tmp_path: pathlib.Path
) -> None:
    """A checkpoint of this session has 6,000 bytes. A repeated request for what is there is no more on the disk."""
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", tenant="b")
    settings = {"tokens": str(tokens.path), "data_dir": str(tmp_path / "data"), "tenant_disk": 10_000}
    with numpy_server(**settings) as server, connected(server, ann) as client, connected(server, bob) as other:
        session: Any = client.create_session(ZEROS, durability="checkpoint", request_id="first")
        saved = session.save_checkpoint("best")
        session.detach()
        assert server.registry.park(server.registry.get(session.session_id))
        create = functools.partial(client.create_session, ZEROS, durability="checkpoint")
        for refused in (create, lambda: session.save_checkpoint("next"), lambda: session.fork(durability="checkpoint")):
            with pytest.raises(stepwire.ResourceExhaustedError, match="--tenant-disk") as told:
                refused()
            assert told.value.metadata["limit"] == "tenant_disk"
        assert session.save_checkpoint("best") == saved
        assert create(request_id="first").session_id == session.session_id
        client.create_session(ZEROS)
        other.create_session(ZEROS, durability="checkpoint")
        session.close()
        create()


def test_a_config_file_has_the_target_and_the_token_for_programs_and_commands(
    server: Server, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STEPWIRE_TARGET", "STEPWIRE_BIND"):
        monkeypatch.delenv(name, raising=False)
    config = tokens.path.with_name("config.toml")
    config.write_text(f'target = "{server.target}"\ntoken_file = "token"\n')
    config.with_name("token").write_text(tokens.add("ann"))
    look(server)
    monkeypatch.setenv("STEPWIRE_CLIENT_CONFIG", str(config))
    with stepwire.connect() as client:
        session_id = client.create_session(ZEROS, durability="checkpoint", keep=True).session_id
    health = CliRunner().invoke(app, ["health"])
    assert health.stdout.startswith(f"{server.target}: serving, ")
    listed = CliRunner().invoke(app, ["checkpoint", "list", session_id, "--json"])
    assert [each["step"] for each in json.loads(listed.stdout)] == [0]


def test_a_reader_reads_and_does_nothing_else(server: Server, tokens: Tokens) -> None:
    trainer, reader, metrics = tokens.add("ann"), tokens.add("eve", Role.READER), tokens.add("max", Role.METRICS)
    look(server)
    with connected(server, trainer) as client, connected(server, reader) as looking:
        session: Any = client.create_session(ZEROS)
        seen: Any = looking.session(session.session_id)
        np.testing.assert_array_equal(seen.pull()["w"], 0.0)
        for forbidden in (lambda: seen.step(ONES), lambda: seen.load(ONES), lambda: looking.create_session(ZEROS)):
            with pytest.raises(stepwire.PermissionDeniedError, match="role reader"):
                forbidden()
        assert session.info().applied_step == 0
    with connected(server, metrics) as client:
        client.info()
        with pytest.raises(stepwire.PermissionDeniedError, match="role metrics"):
            list(client.sessions())


def test_another_tenants_sessions_are_not_there(server: Server, tokens: Tokens) -> None:
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", tenant="b")
    root = tokens.add("root", Role.ADMIN)
    look(server)
    with connected(server, ann) as first, connected(server, bob) as second, connected(server, root) as admin:
        own: Any = first.create_session(ZEROS, request_id="job", durability="checkpoint")
        other: Any = second.create_session(ZEROS, request_id="job", durability="checkpoint")
        assert own.session_id != other.session_id
        never = "0" * 32
        told = []
        for session_id in (own.session_id, never):
            with pytest.raises(stepwire.SessionNotFoundError) as caught:
                second.session(session_id)
            told.append(str(caught.value).replace(session_id, "ID"))
        assert told[0] == told[1]
        assert [each.session_id for each in first.sessions()] == [own.session_id]
        assert (first.info().sessions, admin.info().sessions) == (1, 2)
        assert [each.session_id for each in second.sessions()] == [other.session_id]
        assert {each.session_id for each in admin.sessions()} == {own.session_id, other.session_id}
        admin.session(own.session_id).close()
        assert list(first.sessions()) == []


def test_a_parked_session_of_another_tenant_stays_parked(server: Server, tokens: Tokens) -> None:
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", tenant="b")
    look(server)
    with connected(server, ann) as first, connected(server, bob) as second:
        own: Any = first.create_session(ZEROS, request_id="job", durability="checkpoint")
        own.detach()
        while server.registry.statistics().streams:
            pass
        assert server.registry.park(server.registry.get(own.session_id))
        for call in (
            lambda: second.session(own.session_id),
            lambda: second.session(own.session_id).checkpoints(),
        ):
            with pytest.raises(stepwire.SessionNotFoundError):
                call()
        assert list(second.sessions()) == []
        assert [each.parked for each in first.sessions()] == [True]
        np.testing.assert_array_equal(own.step(ONES)["w"] != 0.0, True)


def test_a_parked_session_without_a_place_is_told_of_no_other_tenants_sessions(
    tokens: Tokens, tmp_path: pathlib.Path
) -> None:
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", tenant="b")
    settings = {"tokens": str(tokens.path), "data_dir": str(tmp_path / "data"), "max_sessions": 2}
    with numpy_server(**settings) as server, connected(server, ann) as first, connected(server, bob) as second:
        own: Any = first.create_session(ZEROS, durability="checkpoint")
        own.detach()
        assert server.registry.park(server.registry.get(own.session_id))
        others = [second.create_session(ZEROS, label="secret").session_id for _ in range(2)]
        with pytest.raises(stepwire.ResourceExhaustedError, match="2 sessions, its most.*holds no session") as refused:
            first.session(own.session_id)
        assert not any(told in str(refused.value) for told in ("secret", *others))


def test_a_revoked_token_steps_no_further(server: Server, tokens: Tokens) -> None:
    ann, bob = tokens.add("ann"), tokens.add("bob")
    look(server)
    with connected(server, ann) as client, connected(server, bob) as another:
        session: Any = client.create_session(ZEROS, keep=True)
        session.step(ONES)
        tokens.revoke("ann")
        look(server)
        with pytest.raises(stepwire.AuthenticationError):
            session.step(ONES)
        assert another.session(session.own_id).info().applied_step == 1


def test_health_needs_no_token_unless_the_operator_says_so(tokens: Tokens) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    for is_open in (True, False):
        with numpy_server(tokens=str(tokens.path), open_health=is_open) as server:
            with grpc.insecure_channel(server.target) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                if is_open:
                    assert check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
                else:
                    with pytest.raises(grpc.RpcError) as caught:
                        check(health_pb2.HealthCheckRequest())
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["example.com:50051", "10.1.2.3:50051"])
def test_a_token_never_leaves_in_plaintext(target: str) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="in the clear"):
        stepwire.connect(target, token="sw_secret")
    stepwire.connect(target, token="sw_secret", tls=True).close()


@pytest.mark.parametrize("token", ["a b", "naïve", "x" * 5000])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="token"):
        stepwire.connect("localhost:1", token=token)


def test_signed_tokens_step_until_their_key_is_replaced(tokens: Tokens, tmp_path: pathlib.Path) -> None:
    """Beside tokens of the file; each sees the sessions of its own tenant."""
    jwt = pytest.importorskip("jwt")
    secret, key = "0123456789abcdef" * 2, tmp_path / "secret"
    key.write_text(secret)
    claims = {"sub": "ann", "role": "trainer", "tenant": "a", "exp": 4e9, "iss": "login", "aud": "stepwire"}
    settings = {"jwt_key": str(key), "jwt_issuer": "login", "jwt_audience": "stepwire"}
    bob = tokens.add("bob", tenant="b")
    with numpy_server(tokens=str(tokens.path), **settings) as server:
        with connected(server, jwt.encode(claims, secret, "HS256")) as client, connected(server, bob) as another:
            session: Any = client.create_session(ZEROS, keep=True)
            session.step(ONES)
            assert list(another.sessions()) == []
            with pytest.raises(stepwire.SessionNotFoundError):
                another.session(session.own_id)
            key.write_text(secret[::-1])
            look(server)
            for call in (lambda: session.step(ONES), client.info):
                with pytest.raises(stepwire.AuthenticationError):
                    call()
            assert another.info().sessions == 0
        with connected(server, jwt.encode(claims | {"exp": 1e9}, secret[::-1], "HS256")) as late:
            with pytest.raises(stepwire.AuthenticationError, match="the token 'ann' has expired"):
                late.info()
        with connected(server, jwt.encode(claims | {"role": "reader"}, secret[::-1], "HS256")) as reader:
            with pytest.raises(stepwire.PermissionDeniedError, match="the token 'ann' has the role reader"):
                reader.create_session(ZEROS)


@pytest.mark.parametrize("name", ["jwt_issuer", "jwt_audience"])
def test_rules_for_signed_tokens_need_a_key(name: str) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="give it too"), numpy_server(**{name: "x"}):
        pass
