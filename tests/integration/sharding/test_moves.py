"""Shards that move: a client that connects to a directory goes on where the next server has announced itself."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connecting import calls_to
from stepwire.wire.directory import ShardDirectory
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_server

NAMES = ("w0", "w1")
START = {name: np.linspace(-1.0, 1.0, 5000, dtype=np.float32) for name in NAMES}


def gradients(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {name: chance.standard_normal(5000).astype(np.float32) for name in NAMES}


def undisturbed(steps: int) -> list[bytes]:
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0)
        replies = [session.step(gradients(step)) for step in range(steps)]
    return [b"".join(reply[name].tobytes() for name in NAMES) for reply in replies]


class Shards:
    """The servers of two shards, in a directory."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack

    def serve(self, shard: int) -> Server:
        """Start a server on the data directory of a shard, at a port of its own."""
        return self._stack.enter_context(
            numpy_server(
                data_dir=str(self.folder / f"data-{shard}"),
                directory=str(self.folder / "directory"),
                shard=f"shard-{shard}",
                drain_seconds=5.0,
            )
        )


def moved(shards: Shards, old: Server) -> None:
    """Drain a server, which saves its sessions, and start another one in its place."""
    assert old.drain()
    old.close()
    shards.serve(1)


def overtaken(shards: Shards, old: Server) -> None:
    """Start another server while the first still works."""
    shards.serve(1)


@pytest.mark.parametrize("move", [moved, overtaken])
def test_a_shard_that_moves_loses_no_step(tmp_path: pathlib.Path, move: Callable[[Shards, Server], None]) -> None:
    expected = undisturbed(4)
    with contextlib.ExitStack() as stack:
        shards = Shards(tmp_path, stack)
        shards.serve(0)
        second = shards.serve(1)
        client = stack.enter_context(stepwire.connect(f"directory:{tmp_path / 'directory'}", timeout=120.0))
        session = client.create_session(
            START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0, durability="journal", request_id="job"
        )
        replies = []
        for step in range(4):
            if step == 2:
                move(shards, second)
            reply = session.step(gradients(step))
            replies.append(b"".join(reply[name].tobytes() for name in NAMES))
        assert replies == expected
        epochs = [shard.info().epoch for shard in session.shards]
        assert epochs == [1, 2]
        directory = ShardDirectory(tmp_path / "directory")
        assert directory.shards() == ["shard-0", "shard-1"]
        entry = directory.entry("shard-1")
        assert (entry.epoch, [*entry.durable_steps.values()]) == (2, [2]), "the steps before the move"


def test_a_shard_is_found_by_its_id_wherever_its_server_stands_in_the_list() -> None:
    with numpy_server() as one, numpy_server() as other, contextlib.ExitStack() as stack:
        first = stack.enter_context(stepwire.connect([one.target, other.target]))
        session = first.create_session(START, optimizer=stepwire.SGD(lr=1.0))
        session.step(START)
        swapped = stack.enter_context(stepwire.connect([other.target, one.target]))
        found = swapped.session(session.session_id)
        pulled = found.pull()
        assert [np.count_nonzero(pulled[name]) for name in NAMES] == [0, 0]
        found.step(START)
        with pytest.raises(stepwire.SessionNotFoundError, match="on none of the servers"):
            swapped.session("0" * 32)


def test_a_directory_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    with pytest.raises(stepwire.UnavailableError, match="names no shard; start servers with --directory"):
        stepwire.connect(f"directory:{tmp_path}")
    directory = ShardDirectory(tmp_path)
    directory.announce("a", 1, "127.0.0.1:1")
    directory.announce("a", 1, "127.0.0.1:1")
    directory.announce("a", 3, "127.0.0.1:3")
    directory.announce("a", 2, "127.0.0.1:2")
    assert directory.newest("a") == (3, "127.0.0.1:3")
    calls = calls_to(f"directory:{tmp_path}", timeout=1.0)
    assert calls.target == f"directory:{tmp_path}/a"
    calls.close()
    with stepwire.connect(f"directory:{tmp_path}/a") as client:  # one shard of it
        assert client.target == f"directory:{tmp_path}/a"
    directory.announce("b", 1, "127.0.0.1:4")
    with pytest.raises(stepwire.InvalidRequestError, match=r"has 2 shards, .* that of the first, '127.0.0.1:3'"):
        calls_to(f"directory:{tmp_path}", timeout=1.0)
    with pytest.raises(stepwire.InvalidRequestError, match="epoch 1 of shard 'a' was announced by another server"):
        directory.announce("a", 1, "127.0.0.1:2")
    with pytest.raises(stepwire.InvalidRequestError, match="no name of a shard"):
        directory.announce("../a", 1, "127.0.0.1:2")
    for settings, problem in (
        ({"advertise": "a:1"}, "needs --directory"),
        ({"directory": str(tmp_path), "shard": "a"}, "needs --data-dir, or --standby"),
        ({"directory": str(tmp_path), "data_dir": str(tmp_path / "data")}, "needs --shard"),
    ):
        with pytest.raises(stepwire.InvalidRequestError, match=problem), numpy_server(**settings):
            pass
