"""The role of a server as health checks hear of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from stepwire_server.config import ServerConfig
from stepwire_server.replication.primary import Primary
from stepwire_server.rpc.replicating import Replication
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits
from tests.support.numpy_server import numpy_pool

PATIENCE_SECONDS = 120.0


class Crowded:
    """A lock that says when somebody waits for it."""

    def __init__(self) -> None:
        self._lock, self.is_crowded = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_crowded.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_server_that_is_deposed_while_it_says_that_it_serves_says_the_truth_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, lock = Registry(numpy_pool(), RegistryLimits(1, 1, 1.0), lambda: 0.0), Crowded()
    replication: Any = Replication(ServerConfig(standby="required"), registry, lambda: 0.0)
    replication._telling = lock
    told: list[str] = []
    replication.start("h:1", lambda epoch: None, lambda problem, lives: told.append(problem))
    primary, problem = replication._primary, Primary.problem.fget
    deposing = threading.Thread(target=primary.depose, args=(2,))

    def slowly(own: Primary) -> str:
        found: str = problem(own)  # type: ignore[misc]
        if not deposing.ident:  # between the look and the telling
            deposing.start()
            while deposing.is_alive() and not lock.is_crowded.wait(0.01):
                pass
        return found

    monkeypatch.setattr(Primary, "problem", property(slowly))
    primary.wake()
    deposing.join(PATIENCE_SECONDS)
    replication.close()
    registry.close()
    assert told == ["", "", "another server speaks for the sessions since epoch 2"]
