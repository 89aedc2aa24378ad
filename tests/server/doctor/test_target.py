"""The doctor at a running server: which ways work, which is used, and what the others lack."""

from __future__ import annotations

from typing import Any

import pytest

import stepwire
from stepwire_server.doctor import machine as doctor
from stepwire_server.doctor.target import examine_target
from stepwire_server.engines.probe import Finding
from stepwire_server.testing import serving


def by_check(target: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_target(target, 120.0)}


def test_every_way_is_tried_and_the_best_is_named() -> None:
    with serving() as target:
        found = by_check(target)
        with stepwire.connect(target) as client:
            assert list(client.sessions()) == [], "what was made for it is gone"
    assert list(found) == ["server", "cuda_ipc", "packets", "shm", "uds", "tcp", "in use"]
    for name in ("uds", "tcp"):
        assert found[name] == Finding(name, True, "works")
    assert found["server"].detail == f"{target} serves, version {stepwire.__version__}, on cpu"
    best = "packets" if found["packets"].ok else "uds"
    assert found["in use"].ok
    assert found["in use"].detail.endswith(f"({best})")
    assert doctor.healthy(found.values())


def test_what_is_missing_is_told_with_its_remedy_and_is_no_fault() -> None:
    with serving(unix_socket="off", shared_memory=False, packets=False) as target:
        found = by_check(target)
    detail, remedy = "the server has no Unix socket", "start it with: --unix-socket auto, or a path"
    assert found["uds"] == Finding("uds", False, detail, remedy, optional=True)
    assert found["shm"].detail == "shared memory is switched off on this server (--no-shared-memory)"
    assert found["packets"].detail == "packet lanes are switched off on this server (--no-packets)"
    assert found["in use"].detail == "sessions that leave the choice to stepwire use TCP (tcp)"
    assert doctor.healthy(found.values())


def test_a_socket_alone_has_no_port(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    with serving(bind=f"unix:{path}", shared_memory=False, packets=False) as target:
        found = by_check(target)
    assert found["tcp"] == Finding("tcp", False, f"the target unix:{path} has no port", optional=True)
    assert found["uds"].ok
    assert found["in use"].detail.endswith("use Unix socket (uds)")


def test_a_server_that_takes_no_sessions_is_told() -> None:
    with serving(memory_budget=1) as target:
        found = by_check(target)
    assert found["session"].detail.startswith("no session can be made: ")
    assert not doctor.healthy(found.values())


def test_a_server_that_drains_is_told(serve: Any) -> None:
    with serve() as server:
        server.drain()
        (found,) = examine_target(server.target, 120.0)
    assert found == Finding(
        "server", False, f"{server.target} drains: it takes no new sessions", "wait for its successor"
    )


def test_a_variable_that_asks_for_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(unix_socket="off") as target:
        monkeypatch.setenv("STEPWIRE_TRANSPORT", "uds")
        found = by_check(target)
    assert found["session"].detail.startswith("no session can be made: transport: 'uds' cannot be had: ")
    assert not doctor.healthy(found.values())


def test_a_server_that_cannot_be_reached_raises() -> None:
    with pytest.raises(stepwire.UnavailableError):
        examine_target("unix:/nonexistent/stepwire.sock", 0.2)
