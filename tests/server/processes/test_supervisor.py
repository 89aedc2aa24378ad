"""Several server processes under one parent: how they come up, die, come back and end."""

from __future__ import annotations

import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.processes.spawn import server_processes
from tests.integration.processes import ServerProcess
from tests.integration.test_drain import half_a_step
from tests.support.raw import RawClient

pytestmark = [pytest.mark.slow, pytest.mark.many]

ONE = {"w": np.ones(3, np.float32)}
AFTER_TWO = np.float32([0.998] * 3)
PATIENCE_SECONDS = 120.0  # a cold start compiles kernels
QUICK = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
DIED = "process ended; its sessions are lost and it is started again"


@pytest.fixture
def flags() -> list[str]:
    """Further flags of the parent."""
    return []


@pytest.fixture
def parent(flags: list[str]) -> Iterator[ServerProcess]:
    """A parent of two processes."""
    with ServerProcess("--processes", "2", "--threads", "1", *flags) as parent:
        yield parent


@pytest.fixture
def serving(parent: ServerProcess) -> Mapping[str, Any]:
    """What the parent says when both serve: their targets and pids."""
    return parent.wait_for("all processes serve")


def connect(target: str) -> stepwire.Client:
    return stepwire.connect(target, timeout=PATIENCE_SECONDS, retry=QUICK)


def ended(descriptors: list[int]) -> bool:
    """Wait until the processes of pidfds have ended."""
    poll = select.poll()
    left = set(descriptors)
    for descriptor in left:
        poll.register(descriptor, select.POLLIN)
    while left and (ready := poll.poll(PATIENCE_SECONDS * 1000)):
        for descriptor, _ in ready:
            poll.unregister(descriptor)
            left.discard(descriptor)
            os.close(descriptor)
    return not left


def test_processes_are_servers_of_their_own_and_the_parent_loads_no_grpc() -> None:
    with server_processes(2, "--device", "cpu", "--memory-budget", "1000") as (targets, pid):
        assert len(set(targets)) == 2
        ids = set()
        for target in targets:
            with connect(target) as client, client.create_session(ONE) as session:
                info = client.info()
                ids.add(info.instance_id)
                assert (info.sessions, info.devices["cpu"]["budget_bytes"]) == (1, 500)
                session.attach(transport="uds")
                session.step(ONE)
        assert len(ids) == 2
        maps = pathlib.Path("/proc", str(pid), "maps").read_text()
        assert "python" in maps
        assert "cygrpc" not in maps
    assert not pathlib.Path("/proc", str(pid)).exists()


@pytest.mark.long
def test_ports_are_written_once_all_serve_and_an_interrupt_is_passed_on(tmp_path: pathlib.Path) -> None:
    """Other tests here end the parent with SIGTERM."""
    port_file = tmp_path / "ports"
    with ServerProcess("--processes", "2", "--threads", "1", "--port-file", str(port_file)) as parent:
        serving = parent.wait_for("all processes serve")
        assert [f"127.0.0.1:{line}" for line in port_file.read_text().splitlines()] == serving["targets"]
        children = [os.pidfd_open(pid) for pid in serving["pids"]]
        with connect(serving["targets"][0]) as client, client.create_session(ONE) as session:
            session.step(ONE)
            parent.signal(signal.SIGINT)
            assert parent.exit_code() == 0
        assert ended(children)


@pytest.mark.parametrize("flags", [["--drain-seconds", "0.1"]])
def test_a_step_that_is_cut_in_one_process_is_told_by_the_parent(
    parent: ServerProcess, serving: Mapping[str, Any]
) -> None:
    with RawClient(serving["targets"][1]) as raw:
        half_a_step(raw)
        parent.signal(signal.SIGTERM)
        assert parent.exit_code() == 1


def test_a_process_that_ends_comes_back_without_its_sessions_and_leaves_the_others(
    parent: ServerProcess, serving: Mapping[str, Any]
) -> None:
    dying, living = map(connect, serving["targets"])
    with dying, living:
        lost, kept = dying.create_session(ONE), living.create_session(ONE)
        lost.step(ONE)
        kept.step(ONE)
        os.kill(serving["pids"][0], signal.SIGKILL)
        death = parent.wait_for(DIED)
        assert (death["process"], death["target"], death["seconds"]) == (0, serving["targets"][0], 0.5)
        assert death["exit_code"] == -9
        assert parent.wait_for("process serves again")["target"] == serving["targets"][0]
        with pytest.raises(stepwire.SessionNotFoundError) as gone:
            lost.step(ONE)
        assert gone.value.metadata["last_known_step"] == "1"
        np.testing.assert_allclose(kept.step(ONE)["w"], AFTER_TWO, rtol=1e-6)
        with dying.create_session(ONE) as again:
            again.attach(transport="uds")
            assert again.applied_step == 0
        kept.close()
    parent.signal(signal.SIGTERM)
    assert parent.exit_code() == 0


@pytest.mark.long
def test_a_process_that_does_not_come_back_is_tried_ever_less_often(
    parent: ServerProcess, serving: Mapping[str, Any]
) -> None:
    host, _, port = serving["targets"][0].rpartition(":")
    process = os.pidfd_open(serving["pids"][0])
    os.kill(serving["pids"][0], signal.SIGKILL)
    assert ended([process])
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind((host, int(port)))
        squatter.listen()
        assert [parent.wait_for(DIED)["seconds"] for _ in range(3)] == [0.5, 1.0, 2.0]
    parent.signal(signal.SIGTERM)
    assert parent.exit_code() == 0, "also in the middle of a pause"


@pytest.mark.long
def test_processes_that_do_not_come_up_end_the_parent_with_their_code() -> None:
    command = [sys.executable, "-m", "stepwire_server", "serve", "--processes", "2", "--bind", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--device", "cuda:0"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "STEPWIRE_LOG_JSON": "true"},
    )
    assert done.returncode == 2
    assert "stepwire: cuda:0 does not work: " in done.stderr
    assert '"event": "process did not come up"' in done.stdout
    assert '"event": "all processes serve"' not in done.stdout


def test_processes_do_not_outlive_a_parent_that_is_killed(parent: ServerProcess, serving: Mapping[str, Any]) -> None:
    children = [os.pidfd_open(pid) for pid in serving["pids"]]
    parent.kill()
    assert ended(children)


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    command = [sys.executable, "-m", "stepwire_server", "serve", "--bind", "127.0.0.1:0", "--device", "cpu"]
    environment = os.environ | {"STEPWIRE_PARENT_PID": "1" if os.getpid() != 1 else "2"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0


def test_processes_may_have_sockets_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("p")
    with ServerProcess("--processes", "2", "--bind", f"unix:{folder}/s") as parent:
        targets = parent.wait_for("all processes serve")["targets"]
        assert targets == [f"unix:{folder}/s.0", f"unix:{folder}/s.1"]
        for target in targets:
            with connect(target) as client:
                assert client.info().sessions == 0
        parent.signal(signal.SIGTERM)
        assert parent.exit_code() == 0
    assert list(folder.iterdir()) == []
