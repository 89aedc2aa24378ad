"""Addresses of servers."""

from __future__ import annotations

import pathlib

import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import boot_id, checked_unix_path, grpc_target, unix_path, unix_target


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("localhost:50051", None),
        ("/run/x", None),
        ("unix", None),
        ("unix:/run/x", "/run/x"),
        ("unix:///run/x", "/run/x"),
        ("unix:x", "x"),
        ("unix:", ""),
    ],
)
def test_the_path_in_a_target(target: str, path: str | None) -> None:
    assert unix_path(target) == path


def test_a_path_becomes_a_target_and_a_path_again() -> None:
    assert unix_path(unix_target("/a b/%41")) == "/a b/%41"


def test_what_grpc_is_told_about_a_path_means_that_path() -> None:
    assert grpc_target("localhost:1") == "localhost:1"
    assert grpc_target("unix:/a b/%41/é") == "unix:/a%20b/%2541/%C3%A9"
    assert grpc_target("unix:///run/x") == "unix:/run/x"


def test_a_relative_path_is_made_absolute() -> None:
    assert checked_unix_path("x.sock", "bind") == f"{pathlib.Path.cwd()}/x.sock"


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_the_length_of_a_path_is_the_kernels(length: int, fits: bool) -> None:
    path = "/" + "x" * (length - 1)
    if fits:
        assert checked_unix_path(path, "unix_socket") == path
        return
    with pytest.raises(InvalidRequestError) as refused:
        checked_unix_path(path, "unix_socket")
    assert str(refused.value) == (
        f"unix_socket: the path {path!r} has 108 bytes, and a Unix socket's at most 107; choose a shorter one"
    )
    assert refused.value.metadata == {"field": "unix_socket"}


@pytest.mark.parametrize("path", ["", "/a\0b"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no path of a socket"):
        checked_unix_path(path, "bind")


@pytest.mark.parametrize("target", ["unix:", "unix:/" + "x" * 107])
def test_a_client_of_a_path_that_cannot_be_is_refused_at_once(target: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target: ") as refused:
        stepwire.connect(target)
    assert refused.value.metadata == {"field": "target"}


def test_the_kernels_run_has_an_id(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "boot_id"
    assert boot_id(file) == ""
    file.write_text("1187d8c4-a565\n")
    assert boot_id(file) == "1187d8c4-a565"
    file.write_bytes(b"\xff\xfe")
    assert boot_id(file) == ""
    assert boot_id() == boot_id() != ""
