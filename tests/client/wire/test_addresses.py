"""Addresses of servers."""

from __future__ import annotations

import pathlib

import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import (
    boot_id,
    checked_unix_path,
    grpc_target,
    is_on_this_host,
    named_host,
    unix_path,
    unix_target,
)


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


GOOD = {
    "localhost:50051": True,
    "LOCALHOST.:50051": True,
    "a.localhost:1": True,
    "127.0.0.1:65535": True,
    "127.9.9.9:1": True,
    "[::1]:50051": True,
    "[::ffff:127.0.0.1]:50051": True,
    "0.0.0.0:50051": True,
    "dns:localhost:50051": True,
    "dns:///localhost:50051": True,
    "DNS://8.8.8.8/localhost:50051": True,
    "ipv4:127.0.0.1:50051,127.0.0.2:50051": True,
    "ipv6:[::1]:50051": True,
    "unix:/run/x": True,
    "host:50051": False,
    "my_service.default.svc:50051": False,
    "10.0.0.1:50051": False,
    "[2001:db8::1]:50051": False,
    "[fe80::1%eth0]:50051": False,
    "dns://8.8.8.8/host:50051": False,
    "ipv4:127.0.0.1:50051,10.0.0.1:50051": False,
    "localhost.example:50051": False,
    "xds:///anything": False,
    "unix-abstract:stepwire": False,
    "vsock:2:50051": False,
}


@pytest.mark.parametrize("target", GOOD)
def test_a_target_of_a_form_that_grpc_has(target: str) -> None:
    assert grpc_target(target) == target
    assert is_on_this_host(target) is GOOD[target]


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("dns:///stepwire:50051", ("stepwire", 50051)),
        ("dns:stepwire.default.svc:1", ("stepwire.default.svc", 1)),
        ("dns:///localhost:50051", None),
        ("dns:///10.0.0.1:50051", None),
        ("dns:///[2001:db8::1]:50051", None),
        ("dns://8.8.8.8/stepwire:50051", None),
        ("stepwire:50051", None),
        ("ipv4:10.0.0.1:50051", None),
    ],
)
def test_a_name_that_may_have_several_addresses(target: str, named: tuple[str, int] | None) -> None:
    assert named_host(target) == named


WRONG = {
    "": "has no name of a host; a target is host:port, such as 'localhost:50051', or unix:/path",
    ":": "has no name of a host",
    ":50051": "has no name of a host",
    "[]:50051": "has no name of a host",
    "localhost": "has no port; a target is host:port",
    "[::1]": "has no port",
    "dns:///localhost": "has no port",
    "localhost:": "has the port ''; a port is a number from 1 to 65535",
    "localhost:http": "has the port 'http'",
    "localhost:0": "has the port '0'",
    "localhost:65536": "has the port '65536'",
    "localhost:99999": "has the port '99999'",
    "localhost:-1": "has the port '-1'",
    "localhost:" + "9" * 5000: "has the port",
    "localhost:50051/": "has the port '50051/'",
    "user@host:50051": "has no name of a host",
    "a/b:50051": "has no name of a host",
    "::1:50051": r"has more than one colon; an IPv6 address stands in brackets, such as '\[::1\]:50051'",
    "http://host:50051/x": "has the scheme 'http', which is none of gRPC's; use 'host:50051'",
    "tcp://host:50051": "has the scheme 'tcp', .* use 'host:50051'",
    " host:50051": "has blanks or characters",
    "host:50051\n": "has blanks or characters",
    "ß:1": "has blanks or characters",
    "\ud800:1": "has blanks or characters",
    "\0:1": "has blanks or characters",
    "host:٣": "has blanks or characters",
    "a:1,b:1": "has a comma; pass a list of targets",
    "ipv4:127.0.0.1": "has no port",
    "unix:\ud800": "is no path of a socket",
}


@pytest.mark.parametrize("target", WRONG, ids=lambda target: ascii(target)[:30])
def test_a_target_that_no_server_can_have_is_refused_at_once(target: str) -> None:
    """GRPC would resolve it until the deadline, take the port modulo 65536, or add the port 443."""
    with pytest.raises(InvalidRequestError, match=f"^target: .*{WRONG[target]}") as refused:
        stepwire.connect(target)
    assert refused.value.metadata == {"field": "target"}
    assert len(str(refused.value)) < 300
    str(refused.value).encode()


def test_the_kernels_run_has_an_id(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "boot_id"
    assert boot_id(file) == ""
    file.write_text("1187d8c4-a565\n")
    assert boot_id(file) == "1187d8c4-a565"
    file.write_bytes(b"\xff\xfe")
    assert boot_id(file) == ""
    assert boot_id() == boot_id() != ""
