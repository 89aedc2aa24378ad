"""The access of calls: one table for every method, and nothing is allowed that is not in it."""

from __future__ import annotations

import pathlib

import msgspec
import pytest
from grpc_health.v1 import health_pb2

from stepwire.errors import AuthenticationError, InvalidRequestError, PermissionDeniedError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import replication_service_pb2
from stepwire_server.access.control import AccessControl, Caller
from stepwire_server.access.identity import EVERYBODY, METHODS, METRICS_PATH, OF_ALL_TENANTS, STATUS_PATH, Role
from stepwire_server.access.tokens import TokenFile, TokenRecord, digest_of, new_token, read_tokens, write_tokens

STEP = "/stepwire.v1.OptimizerService/Step"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "tokens"


def record(token: str, name: str = "ann", role: Role = Role.TRAINER, expires: float | None = None) -> TokenRecord:
    return TokenRecord(name=name, digest=digest_of(token), role=role, expires=expires)


def test_every_method_is_in_the_table() -> None:
    services = [
        pb.DESCRIPTOR.services_by_name["OptimizerService"],
        replication_service_pb2.DESCRIPTOR.services_by_name["ReplicationService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    ]
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert served <= METHODS.keys()
    health = {"/grpc.health.v1.Health/List"}  # in newer releases of its package
    reflection = {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}  # of an optional package
    assert METHODS.keys() - served - health - reflection == {METRICS_PATH, STATUS_PATH}
    assert all(Role.ADMIN in roles for roles in METHODS.values())


def test_a_method_that_is_in_no_table_is_nobodys(path: pathlib.Path) -> None:
    token = new_token()
    write_tokens(path, [record(token, role=Role.ADMIN)])
    access = AccessControl(TokenFile(path))
    assert access.admit(STEP, f"Bearer {token}").name == "ann"
    with pytest.raises(PermissionDeniedError):
        access.admit("/stepwire.v1.OptimizerService/Unheard", f"Bearer {token}")
    with pytest.raises(PermissionDeniedError):
        AccessControl().admit("/stepwire.v1.OptimizerService/Unheard", None)


def test_a_token_of_a_tenant_calls_nothing_that_is_of_all_tenants(path: pathlib.Path) -> None:
    roles = {METRICS_PATH: Role.METRICS}
    assert OF_ALL_TENANTS < METHODS.keys()
    assert {method for method in METHODS if "ReplicationService" in method} < OF_ALL_TENANTS
    for method in OF_ALL_TENANTS:
        for role in (Role.ADMIN, roles.get(method, Role.ADMIN)):
            tenants, whole = new_token(), new_token()
            records = [record(tenants, role=role), record(whole, "root", role=role)]
            write_tokens(path, [msgspec.structs.replace(records[0], tenant="lab"), records[1]])
            access = AccessControl(TokenFile(path))
            assert access.admit(method, f"Bearer {whole}").sees is None
            with pytest.raises(PermissionDeniedError, match=f"is of the tenant 'lab', and {method} is of all tenants"):
                access.admit(method, f"Bearer {tenants}")


def test_without_tokens_everybody_is_admitted() -> None:
    assert all(AccessControl().admit(method, None) == EVERYBODY for method in METHODS)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic abc", "bearer sw_wrong", "sw_right"])
def test_everything_but_a_token_is_refused(path: pathlib.Path, authorization: str | None) -> None:
    write_tokens(path, [record("sw_right")])
    with pytest.raises(AuthenticationError):
        AccessControl(TokenFile(path)).admit(STEP, authorization)


def test_a_token_ends_with_its_time_and_with_its_line(path: pathlib.Path) -> None:
    write_tokens(path, [record("sw_a", expires=100.0), record("sw_b", "bob")])
    now = [99.0]
    file = TokenFile(path)
    access = AccessControl(file, clock=lambda: now[0])
    ann, bob = access.admit(STEP, "Bearer sw_a"), access.admit(STEP, "BEARER sw_b")
    access.check(Caller(ann))
    now[0] = 100.0
    with pytest.raises(AuthenticationError, match="expired"):
        access.check(Caller(ann))
    with pytest.raises(AuthenticationError, match="expired"):
        access.admit(STEP, "Bearer sw_a")
    told: list[str] = []
    file.on_change(lambda: told.append("changed"))
    file.look()
    assert told == []
    write_tokens(path, [record("sw_a")])
    file.look()
    assert told == ["changed"]
    with pytest.raises(AuthenticationError, match="revoked"):
        access.check(Caller(bob))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"name": "a"}]', '[{"name":"a b","digest":"' + "0" * 64 + '"}]'])
def test_a_file_that_is_none_is_refused_and_one_that_turns_wrong_changes_nothing(path: pathlib.Path, text: str) -> None:
    write_tokens(path, [record("sw_a")])
    file = TokenFile(path)
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match="tokens"):
        TokenFile(path)
    file.look()
    assert file.find("sw_a") is not None


def test_a_file_that_others_may_write_is_refused(path: pathlib.Path) -> None:
    write_tokens(path, [record("sw_a")])
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o620)
    with pytest.raises(InvalidRequestError, match="chmod go-w"):
        read_tokens(path)


@pytest.mark.parametrize("same", ["name", "digest"])
def test_names_and_digests_occur_once(path: pathlib.Path, same: str) -> None:
    pair = [record("sw_a"), record("sw_b")] if same == "name" else [record("sw_a"), record("sw_a", "bob")]
    write_tokens(path, pair)
    with pytest.raises(InvalidRequestError, match=f"{same} twice"):
        read_tokens(path)


def test_tokens_are_long_random_and_unlike() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert {len(token) for token in made} == {46}
