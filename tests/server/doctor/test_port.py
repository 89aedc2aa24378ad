"""What the doctor finds about the address that a server would listen on, and that it leaves nothing there."""

from __future__ import annotations

import errno
import os
import pathlib
import socket
from collections.abc import Callable
from typing import Any

import pytest

import stepwire
from stepwire_server.doctor.port import examine_port
from stepwire_server.engines.probe import Finding
from stepwire_server.host import sockets
from stepwire_server.testing import serving


def test_a_free_port_stays_free() -> None:
    assert examine_port("127.0.0.1:0") == Finding("port", True, "127.0.0.1:0 takes a free one")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        bind = f"127.0.0.1:{found.getsockname()[1]}"
    for _ in range(2):
        assert examine_port(bind) == Finding("port", True, f"{bind} is free")


def nobody(target: str) -> str:
    """Ask for a stepwire server where there is none."""
    return ""


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_port_in_use(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert examine_port(f"{name}:{port}", nobody) == Finding(
            "port",
            False,
            f"{name}:{port} cannot be listened on: Address already in use",
            f"find the process with: ss -ltnp 'sport = :{port}'; or choose another port with: --bind 127.0.0.1:0",
        )


def test_a_port_at_which_stepwire_serves_is_no_fault(server: Any) -> None:
    assert examine_port(server.target) == Finding(
        "port",
        False,
        f"a stepwire server is at {server.target} already, version {stepwire.__version__}",
        f"stepwire doctor --target {server.target}; for one more server choose another port with: --bind 127.0.0.1:0",
        optional=True,
    )


def test_a_server_that_refuses_the_question_is_a_server(tmp_path: pathlib.Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("[]")
    with serving(tokens=str(tokens)) as target:
        finding = examine_port(target)
    assert (finding.ok, finding.optional) == (False, True)
    assert finding.detail.startswith(f"a stepwire server is at {target} already, which refuses this call: this server")


def test_a_server_on_every_address_is_asked_on_this_machine(server: Any) -> None:
    asked: list[str] = []
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        assert not examine_port(f"0.0.0.0:{port}", lambda target: asked.append(target) or "").ok
    assert asked == [f"localhost:{port}"]


def refusing(number: int, *families: int) -> Callable[[tuple[Any, ...]], OSError | None]:
    def listen(address: tuple[Any, ...]) -> OSError | None:
        return OSError(number, os.strerror(number)) if not families or address[0] in families else None

    return listen


def both_families(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
    return [
        (family, socket.SOCK_STREAM, 6, "", place)
        for family, place in ((socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0)))
    ]


def test_a_machine_without_ipv6_has_a_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", both_families)
    monkeypatch.setattr(sockets, "_listen", refusing(errno.EADDRNOTAVAIL, socket.AF_INET6))
    assert examine_port("localhost:0").ok


def test_a_port_that_one_of_two_addresses_has_lost_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", both_families)
    monkeypatch.setattr(sockets, "_listen", refusing(errno.EADDRINUSE, socket.AF_INET))
    assert not examine_port("localhost:0").ok


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "choose a port from 1024 up with: --bind 127.0.0.1:50051"),
        (
            errno.EADDRNOTAVAIL,
            "choose an address of this machine, shown by: ip -brief address; such as: --bind 127.0.0.1:50051",
        ),
    ],
)
def test_an_address_that_is_refused(monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    monkeypatch.setattr(sockets, "_listen", refusing(number))
    detail = f"127.0.0.1:80 cannot be listened on: {os.strerror(number)}"
    assert examine_port("127.0.0.1:80") == Finding("port", False, detail, remedy)


@pytest.mark.parametrize("bind", ["nowhere", ":1", "host:", "host:http", "host:65536", "host:-1", "host:²"])
def test_what_is_no_address(bind: str) -> None:
    finding = examine_port(bind)
    assert finding == Finding("port", False, f"{bind!r} is not host:port", "--bind 127.0.0.1:50051")


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = examine_port("nobody.invalid:1")
    assert finding.detail == "nobody.invalid:1 is no address: [Errno -2] Name or service not known"
    assert (finding.ok, finding.remedy) == (False, "--bind 127.0.0.1:50051")


# --- a socket in the place of a port --------------------------------------------------------------------------


def test_a_socket_that_can_be_made_is_free_and_is_not_made(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "deep" / "s"
    assert examine_port(f"unix:{path}") == Finding("socket", True, f"{path} is free")
    assert not path.parent.exists()


def test_a_socket_in_use_is_told_and_one_left_behind_is_free(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        finding = examine_port(f"unix:{path}")
    assert (finding.ok, finding.detail) == (False, f"{path} is in use: another process listens on it")
    assert examine_port(f"unix:{path}").ok


def test_a_socket_that_cannot_be_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("s") / "file"
    file.touch()
    for path, problem in ((file, "is there and is no socket"), (file / "s", f"cannot be made in {file}")):
        finding = examine_port(f"unix:{path}")
        assert (finding.ok, finding.remedy) == (False, "--bind unix:/tmp/stepwire.sock")
        assert finding.detail == f"{path} {problem}"
    assert "has 201 bytes" in examine_port("unix:/" + "x" * 200).detail
