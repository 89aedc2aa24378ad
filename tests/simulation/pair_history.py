"""A history of a primary, its standbys, and those who promote them: faults, and what must hold after each event.

The gradient of each step moves one element by one, as in the histories of clusters. Whoever promotes has no more
knowledge than an operator: a standby says whether it has all.
"""

from __future__ import annotations

import contextlib
import gc
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import pytest

import stepwire
from stepwire.errors import StepwireError
from stepwire_server.replication.claims import Claims
from tests.simulation.history import Broken, applied_in, may_be_repeated, simulated
from tests.simulation.network import Channel, Network
from tests.simulation.pair_server import PORT, SHARD, PairServer
from tests.simulation.runtime import Process, Scheduler
from tests.simulation.servers import parameters_of

__all__ = ["KINDS", "PairFault", "PairShape", "pair_faults_of", "pair_shape_of", "run_pair"]

KINDS: Final = ("cut", "hold", "slow", "apart", "kill", "kill standby", "pause", "pause standby", "promote", "crossed")
"""The faults of a pair.

cut, hold, slow: of the connections of one server, as clients see it. apart: the two cannot reach each other. kill: the
primary ends, and its standby is promoted if it has all. kill standby: it ends, and another one comes. pause: the
primary stands still, its standby is promoted, and it goes on. promote: its standby is promoted while it works.
crossed: the same, while the two cannot reach each other. Where servers come in the vacant role, a primary that was
killed or deposed is started again at once, and its standby promotes itself.
"""

_TIMEOUT_SECONDS: Final = 5.0
_PATIENCE_SECONDS: Final = 600.0
_OFTEN: Final = 20


class PairFault(NamedTuple):
    """One fault: the virtual second, its kind, and how long it lasts."""

    at: float
    kind: str
    seconds: float


class PairShape(NamedTuple):
    """The steps; whether a gradient has several messages, the primary goes on alone, and servers come as is vacant."""

    steps: int
    large: bool
    alone: bool
    vacant: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a server, but whom it follows."""
        mode = {"standby": "preferred" if self.alone else "required"}
        return mode | ({"standby_of": "directory", "promote_after_seconds": 2} if self.vacant else {})

    @property
    def size(self) -> int:
        """The elements of the model."""
        return 20_480 if self.large else 64


def pair_shape_of(seed: int) -> PairShape:
    """Return the shape of a seed's history."""
    chance = random.Random(f"pair {seed}")
    return PairShape(chance.randint(3, 8), chance.random() < 0.3, chance.random() < 0.4, chance.random() < 0.4)


def pair_faults_of(seed: int) -> list[PairFault]:
    """Return the faults of a seed's history."""
    chance = random.Random(f"pair faults {seed}")
    return sorted(
        PairFault(
            round(chance.choice((0.5, 1.0, 6.0)) * chance.uniform(0.0, 1.0), 4),
            chance.choice(KINDS),
            round(chance.choice((0.05, 0.5, 3.0, 12.0)) * chance.uniform(0.2, 1.0), 3),
        )
        for _ in range(chance.randint(0, 6))
    )


def run_pair(seed: int, shape: PairShape, faults: Sequence[PairFault]) -> tuple[int, int]:
    """Let a history happen; return a number made of all choices, and that of promotions.

    Raises:
        Broken: an invariant does not hold.
    """
    with simulated(seed) as (scheduler, folder):
        history = _PairHistory(scheduler, shape, folder)
        history.live(faults)
        found = scheduler.trace, history.promotions
        scheduler.end()
        history.forget()
        del history
        gc.collect()
        return found


_BETWEEN: Final = 1000
"""The way between a primary and its standby is apart from the primary's way to clients, by so much."""


class _PairNetwork(Network):
    def begin(self, shard: int, method: str, kind: str) -> Any:
        """See `Network`."""
        call = super().begin(shard, method, kind)
        if method.endswith("/Follow"):
            for pipe in (call.requests, call.replies):
                pipe._shard = shard + _BETWEEN
        return call

    def part(self, primary: int, seconds: float) -> None:
        """Let nothing pass between a primary and its standby; their connection breaks, or waits."""
        self.hold(primary + _BETWEEN, seconds)
        if self.scheduler.chance.random() < 0.7:
            for call in [call for call in self.calls if call.shard == primary and call.method.endswith("/Follow")]:
                call.break_off()


class _PairHistory:
    def __init__(self, scheduler: Scheduler, shape: PairShape, folder: pathlib.Path) -> None:
        self.scheduler, self.shape, self.promotions = scheduler, shape, 0
        self._folder, self._claims = folder, Claims(folder, SHARD)
        self._network = _PairNetwork(scheduler, self._route)
        self._servers: list[PairServer] = []
        self._primary: PairServer | None = None
        self._standby: PairServer | None = None
        self._sent: set[int] = set()
        self._told: set[int] = set()
        self._finished = self._busy = False
        self._kept: list[Any] = []

    def live(self, faults: Sequence[PairFault]) -> None:
        """Start a primary and a standby, train, let the faults happen, and wait for the end of training."""
        self._primary = self._start(**self.shape.settings)
        self._follow()
        for fault in faults:
            self.scheduler.after(fault.at, lambda fault=fault: self._happen(fault))
        with self._connected():
            self.scheduler.spawn(self._train, Process("client"), "train")
            self.scheduler.each = self._check
            self.scheduler.run(lambda: self._finished)
            self._check_state()

    def forget(self) -> None:
        """Let go of the clients, which refer to everything."""
        self._kept.clear()
        self._network.calls.clear()
        self._network.route = lambda shard: None
        self.scheduler.each = lambda: None

    # --- servers and those who look after them -----------------------------------------------------------

    def _start(self, **settings: Any) -> PairServer:
        server = PairServer(self.scheduler, self._folder, len(self._servers), self._ended, **settings)
        self._servers.append(server)
        server.start()
        return server

    def _ended(self, server: PairServer) -> None:
        """Start a process again that has ended by itself, as whoever runs servers in the vacant role does."""
        assert self._standby is not None
        if self._busy or not self.shape.vacant:  # an operator looks after the pair
            return
        if server is self._primary and self._standby.is_speaking:
            self._primary = self._standby
        elif server is not self._standby:
            return
        self._follow()

    def _follow(self) -> None:
        """Start a standby of the present primary; promoted it is as its primary was."""
        assert self._primary is not None
        self._standby = self._start(**{"standby_of": self._primary.target} | self.shape.settings)

    def _route(self, shard: int) -> PairServer | None:
        server = self._servers[shard]
        return server if server.is_open and not server.process.dead else None

    def _happen(self, fault: PairFault) -> None:
        if self._standby is not None and self._standby.is_speaking and not self._busy:  # it came first
            self._primary, self._standby = self._standby, self._primary
        primary, standby, chance = self._primary, self._standby, self.scheduler.chance
        assert primary is not None and standby is not None
        index = chance.choice((primary, standby)).index
        if fault.kind == "cut":
            self._network.cut(index)
        elif fault.kind in ("hold", "slow"):
            getattr(self._network, fault.kind)(index, fault.seconds)
        elif fault.kind == "apart":
            self._network.part(primary.index, fault.seconds)
        elif fault.kind == "pause standby":
            standby.process.paused = not standby.process.dead
            self.scheduler.after(fault.seconds, lambda: setattr(standby.process, "paused", False))
        elif self._busy:  # somebody looks after the pair already
            return
        elif fault.kind == "kill standby":
            self._look_after(lambda: self._replace(standby, fault.seconds))
        elif self._has_all(standby):  # otherwise the primary has what no other server has, and nobody ends it
            if fault.kind == "kill":
                self.scheduler.kill(primary.process)
                if self.shape.vacant:
                    self._look_after(lambda: self._succeed(standby))
                    return
            elif fault.kind == "pause":
                primary.process.paused = True
                self.scheduler.after(fault.seconds, lambda: setattr(primary.process, "paused", False))
            elif fault.kind == "crossed":
                self._network.part(primary.index, fault.seconds)
            self._look_after(lambda: self._promote(primary, standby, dead=fault.kind == "kill"))

    def _has_all(self, standby: PairServer) -> bool:
        if standby.process.dead or standby.process.paused or standby.replication is None:
            return False
        return standby.is_open and standby.replication.status().in_sync

    def _look_after(self, do: Callable[[], None]) -> None:
        def looked_after() -> None:
            try:
                do()
            finally:
                self._busy = False

        self._busy = True
        self.scheduler.spawn(looked_after, Process("operator"), "operator")

    def _replace(self, standby: PairServer, seconds: float) -> None:
        self.scheduler.kill(standby.process)
        self.scheduler.sleep(seconds)
        self._follow()

    def _succeed(self, standby: PairServer) -> None:
        """Start a killed primary again, whose claim names it still, and wait for its standby to promote itself."""
        self._primary = standby
        self._follow()
        while not (standby.replication is not None and standby.replication.epoch):
            if self.scheduler.now > _PATIENCE_SECONDS:
                raise Broken("a standby that had all did not promote itself")
            self.scheduler.sleep(0.1)
        self.promotions += 1

    def _promote(self, primary: PairServer, standby: PairServer, *, dead: bool) -> None:
        """Promote a standby that had all; where its primary went on without it meanwhile, it stays one."""
        done: list[bool] = []

        def promote() -> None:
            assert standby.replication is not None
            try:
                standby.replication.promote()
                done.append(True)
            except StepwireError:
                done.append(False)

        while not (done and done[-1]):
            self.scheduler.spawn(promote, standby.process, "promote")
            known = len(done)
            while len(done) == known:
                self.scheduler.sleep(0.01)
            if not done[-1] and not dead:
                return  # it may have been left behind: the primary speaks
            if not done[-1] and self.scheduler.now > _PATIENCE_SECONDS:
                raise Broken("a standby that had all is not promoted")
        self.promotions += 1
        self._primary = standby
        self._follow()

    # --- the client --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        def opened(target: str, options: Any = None) -> Channel:
            return Channel(self._network, int(target.rpartition(":")[2]) - PORT)

        make = Claims.make

        def slowly(claims: Claims, claim: Any) -> bool:
            self.scheduler.give_way(0.7)  # between the look of a claimant and its claim
            return make(claims, claim)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(grpc, "insecure_channel", opened)
            patched.setattr(Claims, "make", slowly)
            yield

    def _train(self) -> None:
        scheduler = self.scheduler
        retry = stepwire.Retry(clock=scheduler.clock, sleep=scheduler.sleep, uniform=scheduler.chance.uniform)
        connect = lambda: stepwire.connect(  # noqa: E731
            f"directory:{self._folder}", transport="tcp", timeout=_TIMEOUT_SECONDS, retry=retry
        )
        client = self._until_told(connect)
        self._kept.append(client)  # its end is not part of the history
        zeros = {"w": np.zeros(self.shape.size, np.float32)}
        session = self._until_told(
            lambda: client.create_session(
                zeros, optimizer=stepwire.SGD(lr=1.0), durability="replicated", request_id="job"
            )
        )
        self._kept.append(session)
        for number in range(self.shape.steps):
            gradient = {"w": np.zeros(self.shape.size, np.float32)}
            gradient["w"][number] = 1.0
            self._sent.add(number)
            reply = self._until_told(lambda gradient=gradient: session.step(gradient))
            applied = applied_in(reply["w"], f"the reply to gradient {number}")
            if applied != self._told | {number}:
                raise Broken(f"the reply to gradient {number} has {applied}; told before {self._told}")
            self._told.add(number)
            scheduler.sleep(scheduler.chance.choice((0.0, 0.05, 2.0)))
        self._finished = True

    def _until_told(self, call: Callable[[], Any]) -> Any:
        end = self.scheduler.now + _PATIENCE_SECONDS
        while True:
            try:
                return call()
            except StepwireError as error:
                if not may_be_repeated(error):
                    raise Broken(f"the client met {error.reason}: {error}") from error
                if self.scheduler.now > end:
                    raise Broken(f"no success within {_PATIENCE_SECONDS} s; at last {error.reason}: {error}") from error
            self.scheduler.sleep(0.1)

    # --- invariants --------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.scheduler.failures:
            name, failure = self.scheduler.failures[0]
            raise failure if isinstance(failure, Broken) else Broken(f"{name} ended: {failure!r}") from failure
        if self.scheduler.events % _OFTEN == 0:
            self._check_state()

    def _check_state(self) -> None:
        """Whoever speaks for the session has all that was told, and nothing twice."""
        for server in self._servers:
            values = parameters_of(server, self.shape.size)  # type: ignore[arg-type]
            if values is None:
                continue
            applied = applied_in(values, server.process.name)
            speaks = server.is_speaking and not server.process.dead
            if not applied <= self._sent or (speaks and not self._told <= applied):
                raise Broken(f"{server.process.name} has {applied}; told {self._told}, sent {self._sent}")
