"""A history of a model that moves between servers while it trains: faults, movers that end, and what must hold.

The gradient of each step moves one element of every tensor by one, as in the histories of clusters. A mover moves the
session again and again, onto servers that chance chooses. Each call that it makes may be its last one.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

import stepwire
from stepwire.connection.channel import Calls
from stepwire.errors import StepwireError
from stepwire.links.server import RemoteServer
from stepwire.sharding.move import Move
from stepwire.sharding.server import ShardedServer
from tests.simulation.faults import Fault, chosen
from tests.simulation.history import Broken, History, Shape, applied_in, simulated
from tests.simulation.runtime import Process
from tests.simulation.servers import SimulatedServer

__all__ = ["MovingShape", "moving_faults_of", "moving_shape_of", "run_moving"]

_PORT: Final = 1000
_TIMEOUT_SECONDS: Final = 5.0
_MOVE_SECONDS: Final = 60.0


class MovingShape(NamedTuple):
    """The servers, the tensors, whether shards decide together, the calls of a mover until its end, and the training.

    Attributes:
        servers: the servers.
        tensors: the tensors.
        steps: the steps of each worker.
        two_phase: shards decide together.
        calls: the calls of a mover until its end.
        workers: the clients that step the model.
        asynchronous: each contribution of several is a step of its own.
    """

    servers: int
    tensors: int
    steps: int
    two_phase: bool
    calls: int
    workers: int = 1
    asynchronous: bool = False

    @property
    def size(self) -> int:
        """The elements of a tensor."""
        return max(64, self.steps * self.workers)


class _Ended(BaseException):
    """The end of a mover's process."""


def moving_shape_of(seed: int) -> MovingShape:
    """Return the shape of a seed's history."""
    chance = random.Random(f"moving shape {seed}")
    servers, calls = chance.choice((2, 3, 3, 4)), chance.choice((3, 8, 20, 40, 1000))
    tensors, steps, two_phase = chance.randint(servers, 6), chance.randint(4, 8), chance.random() < 0.5
    workers, asynchronous = chance.choice((1, 1, 2, 3)), chance.random() < 0.3
    return MovingShape(servers, tensors, steps, two_phase, calls, workers, asynchronous)


def moving_faults_of(seed: int) -> list[Fault]:
    """Return the faults of a seed's history."""
    shape = moving_shape_of(seed)
    return chosen(random.Random(f"moving faults {seed}"), shape.servers, most=5, until=0.1 + 0.1 * shape.steps)


def run_moving(seed: int, shape: MovingShape, faults: Sequence[Fault]) -> tuple[int, int]:
    """Let a history happen.

    Returns:
        The trace: equal numbers mean equal histories; and the number of moves.

    Raises:
        Broken: an invariant does not hold.
    """
    with simulated(seed) as (scheduler, folder):
        plain = Shape(shape.servers, shape.workers, shape.steps, shape.two_phase, large=False)
        history = _Moving(scheduler, plain, folder)
        history.moving = shape
        history.live(faults)
        found = scheduler.trace, history.moves
        scheduler.end()
        history.forget()
        del history
        gc.collect()
        return found


class _Moving(History):
    moving: MovingShape
    moves = 0
    _ids: tuple[str, ...] = ()

    def live(self, faults: Sequence[Fault]) -> None:
        """Train beside a mover."""
        self.scheduler.after(0.0, lambda: self.scheduler.spawn(self._move_on, Process("mover"), "move"))
        super().live(faults)

    # --- the client --------------------------------------------------------------------------------------

    def _train(self, worker: int) -> None:
        scheduler = self.scheduler
        first = [f"127.0.0.1:{_PORT + shard}" for shard in range(2)]
        client = stepwire.connect(first, transport="tcp", timeout=_TIMEOUT_SECONDS, retry=self._retry())
        self._clients.append(client)
        session = self._until_told(lambda: self._created(client, worker))
        self._clients.append(session)
        self._ids = self._ids or tuple(session.session_id.split(","))
        for step in range(self.shape.steps):
            self._step(session, worker * self.shape.steps + step)
            scheduler.sleep(scheduler.chance.uniform(0.0, 0.1))
        self._finished += 1

    def _created(self, client: Any, worker: int) -> Any:
        zeros = {f"w{index}": np.zeros(self.moving.size, np.float32) for index in range(self.moving.tensors)}
        workers, mode = self.moving.workers, "async" if self.moving.asynchronous else "sync"
        options = {"reduction": "sum"} if mode == "sync" else {}
        together = stepwire.Aggregation(workers=workers, mode=mode, round_timeout=20.0, **options)
        return client.create_session(
            zeros,
            optimizer=stepwire.SGD(lr=1.0),
            durability="journal",
            request_id="job",
            non_finite="reject" if self.moving.two_phase else "allow",
            aggregation=together if workers > 1 else None,
            worker=worker,
        )

    def _retry(self) -> stepwire.Retry:
        scheduler = self.scheduler
        return stepwire.Retry(clock=scheduler.clock, sleep=scheduler.sleep, uniform=scheduler.chance.uniform)

    # --- movers ------------------------------------------------------------------------------------------

    def _move_on(self) -> None:
        """Move the session whenever it is there, by one mover after another."""
        scheduler, chance = self.scheduler, self.scheduler.chance
        while self._finished < self.shape.workers:
            scheduler.sleep(chance.uniform(0.0, 0.05))
            if not self._ids:
                continue
            targets = [f"127.0.0.1:{_PORT + shard}" for shard in range(self.shape.shards)]
            onto = chance.sample(targets, chance.randint(1, len(targets)))
            try:
                self._moved(targets, onto)
                self.moves += 1
            except StepwireError as error:
                self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
            except _Ended:
                scheduler.sleep(chance.choice((0.0, 1.0, 20.0)))

    def _moved(self, targets: Sequence[str], onto: Sequence[str]) -> None:
        left = [self.scheduler.chance.randint(1, self.moving.calls)]

        class Mortal(Calls):
            """The calls of a mover, one of which is its last: sent or not, and never heard."""

            def _count(self) -> None:
                left[0] -= 1
                if left[0] <= 0:
                    raise _Ended

            def unary(self, *arguments: Any, **options: Any) -> Any:
                self._count()
                return super().unary(*arguments, **options)

            def once(self, *arguments: Any, **options: Any) -> Any:
                found = super().once(*arguments, **options)
                self._count()
                return found

            def upload(self, *arguments: Any, **options: Any) -> Any:
                found = super().upload(*arguments, **options)
                self._count()
                return found

        def opened(target: str) -> RemoteServer:
            return RemoteServer(Mortal(target, timeout_seconds=_TIMEOUT_SECONDS, retry=self._retry()), "tcp")

        servers = [[opened(target) for target in group] for group in (targets, onto)]
        self._clients.extend(server for group in servers for server in group)
        here = ShardedServer(servers[0], opened)
        move = Move(here, servers[1])
        move.make(",".join(self._present_ids()), servers[0][0].calls.deadline(_MOVE_SECONDS))

    def _present_ids(self) -> tuple[str, ...]:
        """Return the ids that the session has by all records that there are."""
        ids = self._ids
        while (known := self._record(ids[0])) is not None:
            ids = known
        return ids

    def _record(self, session_id: str) -> tuple[str, ...] | None:
        for server in self._everybody():
            assert server.registry is not None
            if (moved := server.registry.moved.get(session_id)) is not None:
                return tuple(shard.session_id for shard in moved.shards)
        return None

    def _everybody(self) -> Iterator[SimulatedServer]:
        return (each for servers in self._servers for each in servers if each.registry is not None)

    # --- invariants --------------------------------------------------------------------------------------

    def _check_reply(self, number: int, reply: Any, result: Any) -> None:
        """See `History`; asynchronous steps reach each shard in an order of its own."""
        if not self.moving.asynchronous or self.moving.workers == 1:
            super()._check_reply(number, reply, result)
            return
        for values in reply.values():
            applied = applied_in(values, f"the reply to gradient {number}")
            if number not in applied or not applied <= self._sent:
                raise Broken(f"the reply to gradient {number} has {applied}; sent {self._sent}")

    def _check_all(self) -> None:
        """No session has a gradient twice; those that count now have all that was told, and are somewhere."""
        owners = [max(servers, key=lambda server: server.epoch) for servers in self._servers]
        present = set(self._present_ids()) if self._ids else set()
        for owner in owners:
            if owner.is_open and not owner.process.dead:
                self._check_sessions(owner, present)
        if all(owner.is_open and not owner.process.dead for owner in owners):
            for session_id in present:
                if not any(self._has(owner, session_id) for owner in owners):
                    raise Broken(f"session {session_id} counts, and is nowhere")

    def _check_state(self, server: SimulatedServer) -> None:
        self._check_sessions(server, set())

    def _check_sessions(self, server: SimulatedServer, present: set[str]) -> None:
        assert server.registry is not None
        for session_id, session in list(server.registry._sessions.items()):
            if not session.ledger.ready or session.ledger.closed:
                continue
            for tensor in session.config.layout.tensors:
                values = np.empty(tensor.count, np.float32)
                session._state.read("param", tensor.offset, values)
                applied = applied_in(values, server.process.name)
                told = self._told if session_id in present else set()
                if not told <= applied <= self._sent:
                    raise Broken(f"{server.process.name} has {applied}; told {told}, sent {self._sent}")

    @staticmethod
    def _has(owner: SimulatedServer, session_id: str) -> bool:
        assert owner.registry is not None and owner.registry.directory is not None
        return session_id in owner.registry._sessions or owner.registry.directory.has(session_id)
