"""The servers behind one name: their shards are those that they tell, whatever a name service says of their order."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stepwire.connection.named_servers import Ask, NamedServers, addresses_of
from stepwire.errors import AuthenticationError, InvalidRequestError, Reason, StepwireError, UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb

V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)


def info(shard: str, epoch: int = 1, instance: str = "", problem: str = "") -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        shard=shard, epoch=epoch, instance_id=instance or f"{shard}/{epoch}", not_serving=problem
    )


def silent(problem: str = "connection refused") -> UnavailableError:
    return UnavailableError(problem, reason=Reason.UNREACHABLE)


def asking(told: Mapping[str, pb.GetServerInfoResponse | StepwireError]) -> Ask:
    def ask(endpoint: str, seconds: float) -> pb.GetServerInfoResponse:
        assert seconds == 2.0
        if isinstance(found := told[endpoint], StepwireError):
            raise found
        return found

    return ask


def endpoints(told: Mapping[str, Any], families: Mapping[int, Sequence[str]] | None = None) -> Mapping[str, str]:
    known = {V4: list(told)} if families is None else families
    return NamedServers("stepwire", 50051, asking(told), resolve=lambda host, port: known).endpoints(60.0)


def test_each_server_tells_its_shard_and_the_newest_that_serves_has_it() -> None:
    assert endpoints(
        {
            "10.0.0.4:1": info("b", 7, problem="this server is a standby"),
            "10.0.0.3:1": info("b", 2),
            "10.0.0.2:1": info("a", 3),
            "10.0.0.1:1": info("a", 4),
            "10.0.0.5:1": info("c", problem="this server is a standby"),
        }
    ) == {"a": "10.0.0.1:1", "b": "10.0.0.3:1", "c": ""}


def test_one_address_is_one_server_and_so_is_one_instance_without_a_name() -> None:
    assert endpoints({"10.0.0.1:1": silent()}) == {}
    told = {"10.0.0.1:1": info("", instance="x"), "[fe80::1]:1": info("", instance="x")}
    assert endpoints(told, {V4: ["10.0.0.1:1"], V6: ["[fe80::1]:1"]}) == {}
    assert endpoints({"10.0.0.1:1": info("a"), "10.0.0.2:1": info("a")}) == {"a": "10.0.0.1:1"}


def test_the_last_address_of_shards_is_one_of_them() -> None:
    known = {V4: ["10.0.0.1:1", "10.0.0.2:1"]}
    told = asking({"10.0.0.1:1": info("a"), "10.0.0.2:1": info("b")})
    servers = NamedServers("stepwire", 50051, told, resolve=lambda host, port: known)
    assert servers.endpoints(60.0) == {"a": "10.0.0.1:1", "b": "10.0.0.2:1"}
    known[V4].pop()
    assert servers.endpoints(60.0) == {"a": "10.0.0.1:1"}
    alone = NamedServers("stepwire", 50051, told, are_shards=True, resolve=lambda host, port: known)
    assert alone.endpoints(60.0) == {"a": "10.0.0.1:1"}


def test_all_addresses_of_one_family_have_to_answer() -> None:
    told = {"10.0.0.1:1": info("a"), "10.0.0.2:1": info("b"), "[fe80::1]:1": silent(), "[fe80::2]:1": silent()}
    families = {V6: ["[fe80::1]:1", "[fe80::2]:1"], V4: ["10.0.0.1:1", "10.0.0.2:1"]}
    assert endpoints(told, families) == {"a": "10.0.0.1:1", "b": "10.0.0.2:1"}
    with pytest.raises(UnavailableError, match=r"has 4 addresses, and 3 of them do not answer, such as .*: starting"):
        endpoints(told | {"10.0.0.2:1": silent("starting"), "[fe80::1]:1": silent("starting")}, families)
    with pytest.raises(AuthenticationError, match="no token"):
        endpoints(told | {"10.0.0.2:1": AuthenticationError("no token")}, families)


def test_servers_that_are_no_shards_are_refused_by_their_addresses() -> None:
    with pytest.raises(InvalidRequestError, match=r"the name of 2 servers, and the one at 10.0.0.2:1 tells no shard"):
        endpoints({"10.0.0.1:1": info("a"), "10.0.0.2:1": info("", instance="x")})
    with pytest.raises(InvalidRequestError, match=r"10.0.0.1:1 and 10.0.0.2:1 both serve the shard 'a' in epoch 1"):
        endpoints({"10.0.0.1:1": info("a", instance="x"), "10.0.0.2:1": info("a", instance="y")})


def test_addresses_come_by_family_and_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **options: Any) -> list[Any]:
        if host != "stepwire":
            raise socket.gaierror(-2, "Name or service not known")
        v6, v4 = ("fe80::2%eth0", port, 0, 2), ("10.0.0.1", port)
        return [(socket.AF_INET6, 1, 6, "", v6), *([(socket.AF_INET, 1, 6, "", v4)] * 2)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert addresses_of("stepwire", 50051) == {V6: ["[fe80::2%eth0]:50051"], V4: ["10.0.0.1:50051"]}
    with pytest.raises(UnavailableError, match="the name 'nobody' has no address: .*Name or service not known"):
        addresses_of("nobody", 50051)
