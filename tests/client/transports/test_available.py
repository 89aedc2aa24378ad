"""The ladder, as far as looking goes: what is asked for, and what is in the way."""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.transports.available import MEMORIES, TRANSPORTS, asked_transport, memory_problem, socket_problem
from stepwire.v1 import transport_pb2
from stepwire.wire.addresses import boot_id

OWN = boot_id()
SHARE = "; in a container share its folder, as with: docker run -v /run/stepwire:/run/stepwire, "


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Where a stream socket listens."""
    place = tmp_path_factory.mktemp("s") / "s.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        yield place


def local(**fields: Any) -> transport_pb2.LocalAccess:
    return transport_pb2.LocalAccess(**{"boot_id": OWN, **{name: str(value) for name, value in fields.items()}})


@pytest.mark.parametrize("transport", ["auto", *TRANSPORTS])
def test_a_transport_that_is_named_is_asked_for(transport: str) -> None:
    assert asked_transport(transport, {}) == transport
    assert asked_transport(transport, {"STEPWIRE_TRANSPORT": "uds"}) == ("uds" if transport == "auto" else transport)
    assert asked_transport(transport, {"STEPWIRE_TRANSPORT": ""}) == transport


def test_what_is_no_transport_is_refused_by_where_it_came_from() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        asked_transport("pigeon", {})
    assert (
        str(refused.value) == "transport: 'pigeon' is no transport; use one of: auto, tcp, uds, shm, packets, cuda_ipc"
    )
    with pytest.raises(InvalidRequestError, match="STEPWIRE_TRANSPORT: 'pigeon' is no transport"):
        asked_transport("auto", {"STEPWIRE_TRANSPORT": "pigeon"})


@pytest.mark.parametrize(
    ("boot", "problem"),
    [
        ("", "the server does not tell which machine it runs on"),
        ("x", "the server runs on another machine, or under another kernel"),
    ],
)
def test_a_path_means_nothing_on_another_machine(path: pathlib.Path, boot: str, problem: str) -> None:
    offer = local(boot_id=boot, unix_socket=path, handoff_socket=path)
    assert socket_problem(offer) == memory_problem("shm", offer) == memory_problem("cuda_ipc", offer) == problem
    assert socket_problem(local(unix_socket=path), own_boot_id="y") == (
        "the server runs on another machine, or under another kernel"
    )


def test_a_socket_that_somebody_listens_on_is_no_problem(path: pathlib.Path) -> None:
    assert socket_problem(local(unix_socket=path)) == ""
    assert memory_problem("shm", local(handoff_socket=path)) == ""


def test_a_socket_that_is_not_offered(path: pathlib.Path) -> None:
    assert socket_problem(local()) == "the server has no Unix socket; start it with: --unix-socket auto, or a path"
    assert memory_problem("shm", local()).startswith("the server hands no memory over; ")


def test_a_reason_of_the_servers_is_passed_on(path: pathlib.Path) -> None:
    offer = local(handoff_socket=path, shared_memory_off="no memfd", device_memory_off="no GPU", packets_off="no lane")
    assert [memory_problem(name, offer) for name in MEMORIES] == ["no GPU", "no lane", "no memfd"]


def test_a_socket_in_another_container_cannot_be_seen(path: pathlib.Path) -> None:
    for missing in (path.with_name("other.sock"), path / "below"):
        text = f"the server's socket {missing} cannot be seen from here{SHARE}"
        assert socket_problem(local(unix_socket=missing)).startswith(text)
        assert memory_problem("shm", local(handoff_socket=missing)).startswith(text)
    assert socket_problem(local(unix_socket=missing)).endswith(
        "--unix-socket /run/stepwire/stepwire.sock --handoff-socket /run/stepwire/handoff.sock"
    )


def test_a_socket_that_was_left_behind(path: pathlib.Path) -> None:
    left = path.with_name("left.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    assert socket_problem(local(unix_socket=left)).startswith(f"nobody listens on the server's socket {left} here")


def test_what_is_there_and_is_something_else(path: pathlib.Path) -> None:
    other = path.with_name("other")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(other))
        listener.listen()
        problem = socket_problem(local(unix_socket=other))
    assert problem == f"the server's socket {other} cannot be connected to: Protocol wrong type for socket"


def test_a_socket_of_another_user(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open everything, so the kernel's refusal is pretended."""

    class Closed(socket.socket):
        def connect(self, address: Any) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Closed)
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    owner = path.stat()
    expected = (
        f"the server's socket {path} is closed to uid {os.getuid()}; run both as one user; in a container: "
        f"docker run --user {owner.st_uid}:{owner.st_gid}"
    )
    assert socket_problem(local(unix_socket=path)) == expected
    assert memory_problem("shm", local(handoff_socket=path)) == expected


@pytest.mark.parametrize("name", ["unix_socket", "handoff_socket"])
def test_a_path_that_cannot_be_one_is_no_crash(name: str) -> None:
    offer = local(**{name: "/" + "x" * 200})
    problem = socket_problem(offer) if name == "unix_socket" else memory_problem("shm", offer)
    assert problem.startswith(f"{name}: the path ")


@pytest.mark.parametrize(
    ("named", "uses_cuda", "problem"),
    [(False, True, ""), (True, False, ""), (False, False, "this process does nothing on a GPU; use one before it")],
)
def test_a_program_without_a_gpu_has_to_ask_for_one(
    path: pathlib.Path, named: bool, uses_cuda: bool, problem: str
) -> None:
    offer = local(handoff_socket=path)
    found = memory_problem("cuda_ipc", offer, named=named, uses_cuda=lambda: uses_cuda)
    assert found.startswith(problem) and bool(found) == bool(problem)
    assert memory_problem("shm", offer, named=named, uses_cuda=lambda: uses_cuda) == ""
