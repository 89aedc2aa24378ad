"""Where a server listens: sockets that are private, that replace what was left behind, and that leave nothing."""

from __future__ import annotations

import os
import pathlib
import socket
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import boot_id
from stepwire_server.config import ServerConfig
from stepwire_server.host.sockets import claim_socket
from stepwire_server.server import Server


def make(**settings: Any) -> Server:
    return Server(ServerConfig(**{"bind": "127.0.0.1:0", "device": "cpu", "threads": 1} | settings))


def sessions_at(target: str) -> int:
    with stepwire.connect(target, timeout=10.0) as client:
        return client.info().sessions


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def left_behind(path: pathlib.Path) -> None:
    """Leave a socket that nobody listens on, as a server that was killed does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


# --- a socket beside the port ---------------------------------------------------------------------------------


def test_a_server_has_a_private_socket_of_its_own_until_it_ends(connect: Any) -> None:
    with make() as server, connect(server.target) as wire:
        path = pathlib.Path(server.unix_socket)
        local = wire.info().local
        assert (local.unix_socket, local.boot_id) == (str(path), boot_id())
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with stepwire.connect(f"unix:{path}") as client:
            assert client.info().instance_id == wire.info().instance_id
    assert not path.parent.exists()


def test_a_socket_may_be_switched_off(connect: Any) -> None:
    with make(unix_socket="off") as server, connect(server.target) as wire:
        assert (server.unix_socket, wire.info().local.unix_socket) == ("", "")


def test_a_socket_may_be_named(folder: pathlib.Path, connect: Any) -> None:
    path = folder / "made" / "s %41é.sock"
    with make(unix_socket=str(path)) as server, connect(server.target) as wire:
        assert wire.info().local.unix_socket == str(path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert sessions_at(f"unix:{path}") == 0
    assert list(path.parent.iterdir()) == []


def test_a_private_socket_that_cannot_be_keeps_no_server_from_starting(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with capture_logs() as lines, make(shared_memory=False) as server:
        assert server.unix_socket == ""
        assert sessions_at(server.target) == 0
    (warning,) = [line for line in lines if line["event"] == "no unix socket"]
    assert "a Unix socket's at most 107" in warning["problem"]
    assert list(deep.iterdir()) == []


# --- a socket alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slashes", ["", "//"])
def test_a_server_may_have_no_port(folder: pathlib.Path, slashes: str) -> None:
    with make(bind=f"unix:{slashes}{folder}/s", port_file=str(folder / "port")) as server:
        assert (server.target, server.port, server.unix_socket) == (f"unix:{folder}/s", 0, f"{folder}/s")
        assert (folder / "port").read_text() == "0\n"
        assert sessions_at(server.target) == 0
    assert [path.name for path in folder.iterdir()] == ["port"]


def test_a_second_socket_beside_it_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(
        InvalidRequestError, match="is a second socket beside bind 'unix:/x'; name one of them"
    ) as refused:
        make(bind="unix:/x", unix_socket="/y")
    assert refused.value.metadata == {"field": "unix_socket"}


def test_it_is_private_whatever_the_address_of_others(folder: pathlib.Path) -> None:
    """`insecure` is about networks."""
    with make(bind=f"unix:{folder}/s", insecure=False) as server:
        assert stat.S_IMODE(os.stat(server.unix_socket).st_mode) == 0o600


# --- a path that is taken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["bind", "unix_socket"])
def test_a_socket_that_was_left_behind_is_replaced(folder: pathlib.Path, setting: str) -> None:
    left_behind(folder / "s")
    with make(**{setting: f"unix:{folder}/s" if setting == "bind" else f"{folder}/s"}):
        assert sessions_at(f"unix:{folder}/s") == 0


@pytest.mark.parametrize("setting", ["bind", "unix_socket"])
def test_a_socket_in_use_is_refused_and_goes_on_serving(folder: pathlib.Path, setting: str) -> None:
    with make(bind=f"unix:{folder}/s") as first:
        with pytest.raises(
            InvalidRequestError, match=f"cannot listen on '{folder}/s': another process does"
        ) as refused:
            make(**{setting: first.target if setting == "bind" else first.unix_socket})
        assert refused.value.metadata == {"field": setting}
        assert sessions_at(first.target) == 0
    assert list(folder.iterdir()) == []


def test_a_socket_that_is_too_busy_to_answer_is_in_use(folder: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(f"{folder}/s")
        busy.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(f"{folder}/s")
        with pytest.raises(InvalidRequestError, match="another process does"), claim_socket(f"{folder}/s", "bind"):
            raise AssertionError("claimed")
        for one in waiting:
            one.close()


def test_what_is_no_socket_is_never_removed(folder: pathlib.Path) -> None:
    (folder / "s").write_text("precious")
    with pytest.raises(InvalidRequestError, match=f"'{folder}/s' is there and is no socket"):
        make(bind=f"unix:{folder}/s")
    assert (folder / "s").read_text() == "precious"


def test_a_folder_that_cannot_be_is_refused(folder: pathlib.Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="unix_socket: the folder of .* cannot be used: File exists"):
        make(unix_socket=f"{folder}/file/s")


def test_a_path_that_is_too_long_is_refused_before_a_device_starts() -> None:
    with pytest.raises(InvalidRequestError, match="bind: the path '/xxx.* has 200 bytes"):
        make(bind="unix:/" + "x" * 199, device="cuda:7")


def test_claiming_leaves_the_umask_as_it_was(folder: pathlib.Path) -> None:
    before = os.umask(0o022)
    try:
        with pytest.raises(ZeroDivisionError), claim_socket(f"{folder}/s", "bind"):
            (folder / "file").touch()
            raise ZeroDivisionError
        assert os.umask(0o022) == 0o022
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_port_that_is_taken_leaves_no_socket(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with make() as server:
        before = set(folder.iterdir())
        with pytest.raises(InvalidRequestError, match="the port is taken"):
            make(bind=server.target)
        assert set(folder.iterdir()) == before
    assert list(folder.iterdir()) == []


def test_a_named_socket_that_is_taken_leaves_nothing_of_the_server(folder: pathlib.Path) -> None:
    with make(unix_socket=f"{folder}/s") as first, pytest.raises(InvalidRequestError, match="another process does"):
        make(unix_socket=first.unix_socket)


def test_what_is_offered_to_neighbours_is_told_with_why_not(connect: Any) -> None:
    with make(shared_memory=False, packets=False) as server, connect(server.target) as wire:
        local = wire.info().local
        assert (local.handoff_socket, local.shared_memory_off) == (
            "",
            "shared memory is switched off on this server (--no-shared-memory)",
        )
        assert local.packets_off == "packet lanes are switched off on this server (--no-packets)"
        assert local.device_memory_off != ""
