"""From settings to a handoff that runs, or to the reason why none does; a server starts either way."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig
from stepwire_server.rpc.share_memory import HostSharing
from tests.support.raw_handoff import held_by_process


@pytest.fixture(autouse=True)
def no_session_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_a_named_socket_is_used_and_removed(tmp_path: pathlib.Path) -> None:
    path, before = tmp_path / "handoff.sock", held_by_process()
    sharing = HostSharing(ServerConfig(handoff_socket=str(path)))
    assert (sharing.path, sharing.off, sharing.packets_off, path.is_socket()) == (str(path), "", "", True)
    sharing.start()
    sharing.close()
    sharing.close()
    assert (path.exists(), held_by_process()) == (False, before)


def test_a_server_closed_before_it_started_leaves_nothing(tmp_path: pathlib.Path) -> None:
    before = held_by_process()
    HostSharing(ServerConfig(handoff_socket=str(tmp_path / "handoff.sock"))).close()
    assert (list(tmp_path.iterdir()), held_by_process()) == ([], before)


def test_a_named_socket_that_is_taken_keeps_the_server_from_starting(tmp_path: pathlib.Path, serve: Any) -> None:
    path = str(tmp_path / "handoff.sock")
    with serve(handoff_socket=path):
        with pytest.raises(InvalidRequestError, match="another process does") as refused:
            serve(handoff_socket=path)
        assert refused.value.metadata["field"] == "handoff_socket"


def test_a_named_socket_that_cannot_be_is_refused(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / ("long" * 40))
    with pytest.raises(InvalidRequestError, match="handoff_socket: cannot listen on"):
        HostSharing(ServerConfig(handoff_socket=path))
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_for_the_socket_nothing_is_shared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    sharing = HostSharing(ServerConfig())
    assert (sharing.path, sharing.packets_off) == ("", sharing.off)
    assert {"transport_shm", "transport_packets"} <= sharing.sharing.features_off
    assert sharing.off.startswith("there is no socket to hand shared memory over: ")
    sharing.start()
    sharing.close()


def test_it_can_be_switched_off() -> None:
    sharing = HostSharing(ServerConfig(shared_memory=False, packets=False))
    assert (sharing.path, sharing.off) == ("", "shared memory is switched off on this server (--no-shared-memory)")
    sharing.close()


def test_where_there_is_no_shared_memory_to_be_made_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with contextlib.closing(HostSharing(ServerConfig())) as sharing:
        assert (sharing.off, sharing.packets_off) == ("shared memory needs Linux", "")


@pytest.mark.parametrize(("uids", "mode"), [("", 0o600), ("1000,1001", 0o666)])
def test_named_users_may_connect(tmp_path: pathlib.Path, uids: str, mode: int) -> None:
    path = tmp_path / "handoff.sock"
    sharing = HostSharing(ServerConfig(handoff_socket=str(path), handoff_uids=uids))
    assert path.stat().st_mode & 0o777 == mode
    sharing.close()


def test_closing_the_server_removes_the_private_folder(tmp_path: pathlib.Path, serve: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve(unix_socket="off") as server:
        assert pathlib.Path(server.handoff.path).is_socket()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "devices", "off", "device_off"),
    [
        ({}, ["cuda:0"], "", ""),
        ({}, ["cpu"], "", "the server's sessions live on no GPU"),
        ({"cuda_ipc": False}, ["cuda:0"], "", "CUDA IPC is switched off on this server (--no-cuda-ipc)"),
        ({"shared_memory": False}, ["cuda:0", "cuda:1"], "shared memory is switched off on this server", ""),
    ],
)
def test_memory_of_devices_is_switched_by_itself(
    settings: dict[str, bool], devices: list[str], off: str, device_off: str
) -> None:
    with contextlib.closing(HostSharing(ServerConfig(**settings), devices=devices)) as sharing:
        assert sharing.off.startswith(off) and bool(sharing.off) == bool(off)
        assert (sharing.device_off, pathlib.Path(sharing.path).is_socket()) == (device_off, True)
        expected = {name for name, why in [("transport_shm", off), ("transport_cuda_ipc", device_off)] if why}
        assert sharing.sharing.features_off == expected
