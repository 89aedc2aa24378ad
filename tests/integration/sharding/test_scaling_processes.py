"""A model that trains while it moves between servers in processes of their own; some of them end, or are killed."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.cli.scaling import Scaling
from stepwire_server.testing import serving
from tests.integration.processes import ServerProcess, run_command
from tests.integration.training import bits

SHAPES = {"w": (5, 70_000), "b": (7,)}
OPTIONS: dict[str, Any] = {"optimizer": stepwire.Adam(lr=1e-2), "clip_grad_norm": 1.0}


def gradient(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {name: chance.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


class Training:
    """Steps of a session in a thread, until it is told to end; a context manager."""

    def __init__(self, session: stepwire.Session) -> None:
        self.replies: list[Any] = []
        self._session, self._over = session, threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def further(self, steps: int) -> None:
        """Wait for so many more steps."""
        with self._changed:
            wanted = len(self.replies) + steps
            assert self._changed.wait_for(lambda: self._failure or len(self.replies) >= wanted, 120.0)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                reply = bits(self._session.step(gradient(len(self.replies) + 1)))
                with self._changed:
                    self.replies.append(reply)
                    self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def __enter__(self) -> Training:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def undisturbed(steps: int) -> list[Any]:
    with serving() as target, stepwire.connect(target) as client:
        session = client.create_session(gradient(0), **OPTIONS)
        return [bits(session.step(gradient(step))) for step in range(1, steps + 1)]


@pytest.mark.long
@pytest.mark.slow
def test_training_goes_on_through_moves_between_processes() -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess()) for _ in range(4)]
        targets = [server.target for server in servers]
        client = stack.enter_context(stepwire.connect(targets[:2]))
        session = client.create_session(gradient(0), **OPTIONS)
        with Training(session) as training:
            training.further(3)
            for onto in (targets, targets[:2], targets[:3], targets[1:3]):  # 2 to 4, 4 to 2, 2 to 3, 3 to 2
                found = stepwire.move_session(session.own_id, targets, onto)
                training.further(3)
                assert (session.own_id, len(session.shards)) == (found, len(onto))
            servers[0].signal(signal.SIGTERM)
            servers[3].signal(signal.SIGTERM)
            training.further(3)
        assert [servers[rank].exit_code() for rank in (0, 3)] == [0, 0]
        assert training.replies == undisturbed(len(training.replies))
        assert len(training.replies) >= 18


@pytest.mark.long
@pytest.mark.slow
def test_a_cluster_without_ray_is_scaled_by_the_command(tmp_path: pathlib.Path) -> None:
    """Servers of a directory: killed and restarted in between, and fewer in the end."""
    with contextlib.ExitStack() as stack:

        def served(name: str) -> ServerProcess:
            flags = ("--data-dir", str(tmp_path / name), "--directory", str(tmp_path / "directory"), "--shard", name)
            return stack.enter_context(ServerProcess(*flags))

        def target(name: str) -> str:
            return f"directory:{tmp_path / 'directory'}/{name}"

        servers = {name: served(name) for name in ("a", "b", "c")}
        client = stack.enter_context(stepwire.connect([target("a"), target("b")]))
        session = client.create_session(gradient(0), durability="journal", keep=True, **OPTIONS)
        with Training(session) as training:
            training.further(2)
            servers["b"].kill()
            served("b")
            training.further(2)
            onto = [flag for name in ("c", "b", "a") for flag in ("--onto", target(name))]
            assert run_command("cluster", "move", session.own_id, "--target", target("a"), *onto) == 2  # b is missing
            former = [flag for name in ("a", "b") for flag in ("--target", target(name))]
            assert run_command("cluster", "move", session.own_id, *former, *onto) == 0
            training.further(2)
            servers["c"].kill()
            served("c")
            training.further(2)
            scaling = Scaling(tmp_path / "directory")
            (found,) = scaling.scale([session.own_id], ["a", "b", "c"], ["b"], ["a", "c"])
            scaling.end(["a", "c"])
            training.further(2)
            assert session.own_id == found
        assert training.replies == undisturbed(len(training.replies))
        with stepwire.connect(f"directory:{tmp_path / 'directory'}") as late:
            assert late.target == target("b")
            assert late.session(found).applied_step == len(training.replies)
        with pytest.raises(stepwire.InvalidRequestError, match="1 more sessions are on b, which is to end"):
            list(scaling.scale([], ["b"], ["a"], ["b"]))
