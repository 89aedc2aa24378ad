"""Network namespaces as hosts: each has a network card of its own, and all are joined by one switch."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from stepwire_server.processes.port_file import await_ports
from tests.guards.source import ROOT

_PATH: Final = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_START_SECONDS: Final = 60.0
_SEED: Final = 7
PORT: Final = 50051
"""The port of every server: each has a host of its own."""


class Hosts:
    """Hosts at one switch. What runs on them, and the hosts, end with the block that made them."""

    def __init__(self, stack: contextlib.ExitStack, folder: pathlib.Path, lost: float) -> None:
        if (tool := shutil.which("ip", path=_PATH)) is None:
            pytest.skip("ip, of Debian's package iproute2, is not installed")
        self._stack, self._folder, self._ip = stack, folder, tool
        self._prefix, self._count, self._addresses = f"sw{os.getpid()}", 0, dict[str, str]()
        self._switch = self._add("switch")
        self._lossy: subprocess.Popen[str] | None = None
        if lost:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            program = ("-m", "tests.integration.hosts.lossy_switch", str(lost), str(_SEED))
            self._lossy = self.start("switch", *program, **pipes)
        else:
            self._run("-n", self._switch, "link", "add", "switch", "type", "bridge")
            self._run("-n", self._switch, "link", "set", "switch", "up")

    def add(self, name: str) -> str:
        """Add a host, and return its address."""
        namespace, self._count = self._add(name), self._count + 1
        self._addresses[name] = address = f"10.77.0.{self._count}"
        if self._lossy is None:
            there = ("netns", self._switch, "name", name)
            self._run("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", *there)
            self._run("-n", self._switch, "link", "set", name, "master", "switch", "up")
        else:
            self._plug(self._lossy, namespace)
        self._run("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._run("-n", namespace, "link", "set", device, "up")
        return address

    def cut(self, name: str) -> None:
        """Pull a host's cable: nothing reaches it, and nobody is told."""
        self._run("-n", self._switch, "link", "set", name, "nomaster")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self._run("-n", self._switch, "link", "set", name, "master", "switch")

    def sent_bytes(self, name: str) -> int:
        """Return the bytes that a host has sent so far."""
        (found,) = json.loads(self._run("-n", self._space(name), "-s", "-j", "link", "show", "eth0"))
        count: int = found["stats64"]["tx"]["bytes"]
        return count

    def repeated_segments(self, name: str) -> int:
        """Return how many segments of TCP a host has sent again."""
        lines = self._run("netns", "exec", self._space(name), "cat", "/proc/net/snmp").splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a Python program on a host."""
        there = [self._ip, "netns", "exec", self._space(name), sys.executable, *command]
        process = subprocess.Popen(there, cwd=ROOT, **options)
        self._stack.callback(_ended, process)
        return process

    def serve(self, name: str, *flags: str) -> subprocess.Popen[Any]:
        """Start a server on a host, and return its process once it listens."""
        port_file = self._folder / f"{name}-{time.monotonic_ns()}.port"
        bind = ("--bind", f"{self._addresses[name]}:{PORT}", "--insecure", "--unix-socket", "off")
        common = ("--device", "cpu", "--threads", "1", "--log-level", "error", "--port-file", str(port_file))
        process = self.start(name, "-m", "stepwire_server", "serve", *bind, *common, *flags)
        deadline = time.monotonic() + _START_SECONDS
        assert await_ports(process, port_file, lambda: time.monotonic() < deadline) == [PORT]
        return process

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _add(self, name: str) -> str:
        namespace = self._space(name)
        self._run("netns", "add", namespace)
        self._stack.callback(self._run, "netns", "delete", namespace)
        return namespace

    def _plug(self, switch: subprocess.Popen[str], namespace: str) -> None:
        assert switch.stdin is not None and switch.stdout is not None
        switch.stdin.write(f"{namespace}\n")
        switch.stdin.flush()
        if not switch.stdout.readline():
            raise OSError("/dev/net/tun makes no network cards")

    def _run(self, *command: str) -> str:
        done = subprocess.run([self._ip, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())
        return done.stdout


def _ended(process: subprocess.Popen[Any]) -> None:
    with process:
        process.kill()


@contextlib.contextmanager
def hosts_in(folder: pathlib.Path, *, lost: float = 0.0) -> Iterator[Hosts]:
    """Make a switch and the host `client` for a block, or skip the test where nobody may.

    Args:
        folder: a folder for files.
        lost: the portion of frames that the switch loses; 0 for the kernel's own switch, whose cables can be cut.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = Hosts(stack, folder, lost)
            made.add("client")
        except OSError as problem:
            pytest.skip(f"network namespaces cannot be made here: {problem}; run as root, with CAP_SYS_ADMIN")
        yield made
