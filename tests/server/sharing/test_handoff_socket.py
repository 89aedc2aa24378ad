"""The path of the handoff, its permissions, and the files on the disk."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import socket
import stat
import tempfile
from collections.abc import Iterator

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.host.sockets import claim_socket
from stepwire_server.sharing.handoff_socket import HandoffSocket
from tests.support.raw_handoff import held_by_process

claim = functools.partial(claim_socket, field="handoff_socket")


def mode(path: str | pathlib.Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@contextlib.contextmanager
def listening(path: str = "", uids: tuple[int, ...] = ()) -> Iterator[HandoffSocket]:
    listener = HandoffSocket(path, claim, uids)
    try:
        yield listener
    finally:
        listener.close()
        listener.close()
        listener.socket.close()


@pytest.fixture
def temporary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder for temporary files; there is none of a session."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return folder


def test_a_private_folder_is_made_and_removed(temporary: pathlib.Path) -> None:
    with listening() as listener:
        (folder,) = temporary.iterdir()
        assert listener.path == str(folder / "handoff.sock")
        assert (mode(folder), mode(listener.path)) == (0o700, 0o600)
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_SEQPACKET
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    assert list(temporary.iterdir()) == []


def test_the_folder_of_the_users_session_comes_first(
    temporary: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with listening() as listener:
        assert pathlib.Path(listener.path).parents[1] == runtime
    assert list(runtime.iterdir()) == []
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    with listening() as listener:
        assert pathlib.Path(listener.path).parents[1] == temporary


def test_named_users_can_reach_it(
    temporary: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # a folder that is closed to other users
    with listening(uids=(1000,)) as listener:
        assert pathlib.Path(listener.path).parents[1] == temporary
        assert (mode(pathlib.Path(listener.path).parent), mode(listener.path)) == (0o711, 0o666)


def test_a_named_path_is_used_and_left_clean(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "handoff.sock"
    with listening(str(path)) as listener:
        assert (listener.path, mode(path)) == (str(path), 0o600)
    assert (path.exists(), path.parent.exists()) == (False, True)


def test_a_live_socket_is_refused_and_a_dead_one_replaced(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "handoff.sock")
    with listening(path):
        before = held_by_process()[0]
        with pytest.raises(InvalidRequestError, match="another process does"):
            HandoffSocket(path, claim)
        assert held_by_process()[0] == before
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(path)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(path)
    dead.close()
    with listening(path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)


def test_closing_again_leaves_what_another_server_has_put_there(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "handoff.sock")
    with listening(path) as first:
        first.close()
        with listening(path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            first.close()
            client.connect(path)


def test_a_path_that_is_too_long_leaves_nothing(temporary: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    before = held_by_process()[0]
    with pytest.raises((OSError, InvalidRequestError)):
        HandoffSocket("", claim)
    assert (list(deep.iterdir()), held_by_process()[0]) == ([], before)
