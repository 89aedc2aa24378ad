"""Servers and clients on hosts of their own: cables are pulled, packets are lost, and no step is lost or doubled."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import stepwire
from stepwire.wire.directory import ShardDirectory
from stepwire_server.cli import serve as cli
from tests.integration.hosts.hosts import PORT, Hosts, hosts_in
from tests.integration.hosts.trainer import SHARDS, START, digest_of, gradients, options_of
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.slow

STEPS = 6
HALF_GRADIENT_BYTES = 2 * START["w0"].nbytes


@functools.cache
def expected() -> list[list[Any]]:
    """Return the numbers and digests of steps that nothing disturbs."""
    options = options_of("memory")
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session: Any = client.create_session(START, **options)
        return [[step + 1, digest_of(session.step(gradients(step)))] for step in range(STEPS)]


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> Iterator[Hosts]:
    with hosts_in(tmp_path) as made:
        yield made


class Trainer:
    """The training program, on the host `client`."""

    def __init__(self, hosts: Hosts, target: Any, durability: str) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        program = ("-m", "tests.integration.hosts.trainer", json.dumps(target), durability)
        self._hosts, self._process = hosts, hosts.start("client", *program, **pipes)
        assert self._line() == "ready"

    def begin(self) -> int:
        """Have a step made, and return the bytes that the host had sent before."""
        sent = self._hosts.sent_bytes("client")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return sent

    def end(self) -> list[Any]:
        """Wait for the step, and return its number and digest."""
        found: list[Any] = json.loads(self._line())
        return found

    def step(self) -> list[Any]:
        self.begin()
        return self.end()

    def _line(self) -> str:
        line: str = self._process.stdout.readline()
        assert line, f"the training program ended with exit code {self._process.wait()}"
        return line.strip()


def shards_on(hosts: Hosts, folder: pathlib.Path) -> list[str]:
    """Start a server on each of four hosts, and return their targets."""
    targets = []
    for index in range(SHARDS):
        targets.append(f"{hosts.add(f'shard-{index}')}:{PORT}")
        hosts.serve(f"shard-{index}", "--data-dir", str(folder / f"data-{index}"))
    return targets


def test_each_shard_is_cut_off_in_the_middle_of_a_step_and_no_step_is_lost_or_doubled(
    hosts: Hosts, tmp_path: pathlib.Path, until: Callable[[Callable[[], bool]], None]
) -> None:
    trainer = Trainer(hosts, shards_on(hosts, tmp_path), "journal")
    steps = [trainer.step()]
    for index in range(SHARDS):
        hosts.cut(f"shard-{index}")
        sent = trainer.begin()
        until(lambda sent=sent: hosts.sent_bytes("client") - sent > HALF_GRADIENT_BYTES)  # type: ignore[misc]
        hosts.mend(f"shard-{index}")
        steps.append(trainer.end())
    steps.append(trainer.step())
    assert steps == expected()


@pytest.mark.long
def test_packets_are_lost_and_no_step_is(tmp_path: pathlib.Path) -> None:
    with hosts_in(tmp_path, lost=0.05) as hosts:
        trainer = Trainer(hosts, shards_on(hosts, tmp_path), "journal")
        assert [trainer.step() for _ in range(STEPS)] == expected()
        assert hosts.repeated_segments("client") > 0


@pytest.mark.long
def test_a_primary_that_is_cut_off_is_replaced_and_tells_nothing_when_it_is_back(
    hosts: Hosts, tmp_path: pathlib.Path
) -> None:
    """Its directory is a folder of this machine, as a shared file system is for hosts whose own network works."""
    folder = tmp_path / "directory"
    flags = ("--directory", str(folder), "--shard", "a", "--standby", "preferred", "--standby-of", "directory")
    servers = {}
    for name in ("first", "second"):
        hosts.add(name)
        servers[name] = hosts.serve(name, *flags, "--promote-after-seconds", "1")
    first = ShardDirectory(folder).newest("a")[1]
    trainer = Trainer(hosts, f"directory:{folder}", "replicated")
    steps = [trainer.step() for _ in range(2)]
    hosts.cut("first")
    steps.append(trainer.step())  # once client and standby have noticed that nothing comes from there
    assert ShardDirectory(folder).newest("a")[1] != first
    hosts.mend("first")
    steps += [trainer.step() for _ in range(STEPS - len(steps))]
    assert steps == expected()
    assert servers["first"].wait(60.0) == cli.RESTART_EXIT_CODE
