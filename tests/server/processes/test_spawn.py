"""A server as a process of its own."""

from __future__ import annotations

import os
import pathlib
import select
import signal
import subprocess
import sys

import pytest

import stepwire
from stepwire_server.processes.spawn import server_process


def test_a_server_process_serves_until_the_block_ends() -> None:
    with server_process("--device", "cpu", "--max-sessions", "3") as server:
        with stepwire.connect(server.target) as client:
            assert list(client.info().devices) == ["cpu"]
        assert pathlib.Path("/proc", str(server.pid)).exists()
        assert server.pid != os.getpid()
        assert os.getpgid(server.pid) == server.pid  # so Ctrl-C in the terminal is its parent's alone
    assert not pathlib.Path("/proc", str(server.pid)).exists()


def test_a_server_process_that_does_not_come_up_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(stepwire.UnavailableError, match=r"did not start \(exit code 2\)"),
        server_process("--bind", "nowhere"),
    ):
        raise AssertionError("started")
    assert capfd.readouterr().err == "stepwire: bind: 'nowhere' is not host:port or unix:/path\n"


def test_a_server_process_that_ends_too_early_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with server_process("--device", "cpu") as server:
        watched = os.pidfd_open(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        assert select.select([watched], [], [], 120.0)[0] == [watched]
        os.close(watched)
    told = f"the server process {server.pid} ended before it was told to: exit code -9\n"
    assert capfd.readouterr().err == told


_PROGRAM = """
from stepwire_server.processes.spawn import server_process
with server_process("--device", "cpu") as server:
    print(server.pid, flush=True)
    input()
"""


def test_a_server_process_ends_with_a_program_that_is_killed() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], text=True, **pipes) as program:
        assert program.stdout is not None
        server = os.pidfd_open(int(program.stdout.readline()))
        try:
            program.kill()
            assert select.select([server], [], [], 120.0)[0] == [server]  # readable when the process has ended
        finally:
            os.close(server)
