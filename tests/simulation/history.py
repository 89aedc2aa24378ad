"""One history: clients that train over simulated servers, faults, and what must hold after each event.

The gradient of each step moves one element of every shard by one. So the parameters tell which steps were applied, and
how often.
"""

from __future__ import annotations

import contextlib
import gc
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import stepwire
from stepwire.connection import errands
from stepwire.errors import (
    DeadlineExceededError,
    FencedError,
    NotEnoughWorkersError,
    Reason,
    StateChangedError,
    StepwireError,
    UnavailableError,
)
from tests.simulation.disks import SharedDisk
from tests.simulation.faults import Fault, chosen
from tests.simulation.network import Channel, Network
from tests.simulation.primitives import installed
from tests.simulation.runtime import Process, Scheduler, Stuck
from tests.simulation.servers import SimulatedServer, parameters_of

__all__ = ["Broken", "Outcome", "Shape", "applied_in", "faults_of", "may_be_repeated", "run", "shape_of", "simulated"]

_PORT = 1000
_TIMEOUT_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0
_OFTEN = 50


class Broken(AssertionError):
    """An invariant that does not hold."""


class Shape(NamedTuple):
    """The shape of a history.

    Attributes:
        shards: the servers of the model.
        workers: the clients that step it.
        steps: the steps of each.
        two_phase: all shards decide together.
        large: a gradient of a shard has several messages.
    """

    shards: int
    workers: int
    steps: int
    two_phase: bool
    large: bool

    @property
    def size(self) -> int:
        """The elements of a shard."""
        return 2560 if self.large else max(64, self.workers * self.steps)


class Outcome(NamedTuple):
    """The end of a history.

    Attributes:
        events: the number of events.
        seconds: the virtual seconds.
        trace: equal numbers mean equal histories.
        refused: the failures that clients met, by the name of their reason.
    """

    events: int
    seconds: float
    trace: int
    refused: dict[str, int]


def shape_of(seed: int) -> Shape:
    """Return the shape of a seed's history; most are small, and each hundredth has 64 shards and 8 workers."""
    chance = random.Random(f"shape {seed}")
    if seed % 100 == 99:
        return Shape(64, 8, 2, two_phase=chance.random() < 0.5, large=False)
    shards, workers = chance.choice(((1, 1), (2, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 3)))
    return Shape(shards, workers, chance.randint(3, 6), chance.random() < 0.5, chance.random() < 0.15)


def faults_of(seed: int) -> list[Fault]:
    """Return the faults of a seed's history."""
    shape = shape_of(seed)
    return chosen(random.Random(f"faults {seed}"), shape.shards, most=8, until=0.03 + 0.02 * shape.steps)


def run(seed: int, shape: Shape, faults: Sequence[Fault]) -> Outcome:
    """Let a history happen.

    Raises:
        Broken: an invariant does not hold.
    """
    with simulated(seed) as (scheduler, folder):
        history = History(scheduler, shape, folder)
        history.live(faults)
        outcome = Outcome(scheduler.events, scheduler.now, scheduler.trace, history.refused)
        scheduler.end()
        history.forget()
        del history
        gc.collect()
        return outcome


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[tuple[Scheduler, pathlib.Path]]:
    """Have all modules run on the scheduler of a seed for a block; yields it, and a folder for the disks.

    Raises:
        Broken: nothing can go on.
    """
    scheduler = Scheduler(random.Random(seed))
    place = "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stepwire-simulation-", dir=place))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would end things at moments that no seed chooses
    errands.run(lambda: None)  # the real threads of the client are at rest behind it
    try:
        with installed(scheduler):
            yield scheduler, folder
    except Stuck as stuck:
        raise Broken(str(stuck)) from stuck
    finally:
        if was_enabled:
            gc.enable()
        shutil.rmtree(folder, ignore_errors=True)


class History:
    def __init__(self, scheduler: Scheduler, shape: Shape, folder: pathlib.Path) -> None:
        self.scheduler, self.shape = scheduler, shape
        self.refused: dict[str, int] = {}
        self._network = Network(scheduler, self._route)
        self._disks = [SharedDisk(folder / f"shard-{shard}") for shard in range(shape.shards)]
        self._servers: list[list[SimulatedServer]] = [[] for _ in range(shape.shards)]
        self._stale_until = [0.0] * shape.shards
        self._sent: set[int] = set()
        self._told: set[int] = set()
        self._replies: dict[int, bytes] = {}
        self._finished = 0
        self._clients: list[Any] = []

    def live(self, faults: Sequence[Fault]) -> None:
        """Start the servers and the clients, let the faults happen, and wait for the end of training."""
        for shard in range(self.shape.shards):
            self._start(shard)
        for fault in faults:
            self.scheduler.after(fault.at, lambda fault=fault: self._happen(fault))
        with self._connected():
            for worker in range(self.shape.workers):
                process = Process(f"client {worker}")
                self.scheduler.spawn(lambda worker=worker: self._train(worker), process, "train")
            self.scheduler.each = self._check
            self.scheduler.run(lambda: self._finished == self.shape.workers)
            self._check_all()

    def forget(self) -> None:
        """Let go of the clients: a stream that lives refers to its network, and so to everything."""
        self._clients.clear()
        self._network.calls.clear()
        self._network.route = lambda shard: None
        self.scheduler.each = lambda: None

    # --- servers -----------------------------------------------------------------------------------------

    def _start(self, shard: int) -> SimulatedServer:
        server = SimulatedServer(self.scheduler, self._disks[shard], shard, len(self._servers[shard]))
        self._servers[shard].append(server)
        server.start(self._recovered)
        return server

    def _route(self, shard: int) -> SimulatedServer | None:
        """Return the owner of a shard; with a stale directory the oldest process that lives."""
        living = [server for server in self._servers[shard] if not server.process.dead and server.is_open]
        if not living:
            return None
        choose = min if self._stale_until[shard] > self.scheduler.now else max
        return choose(living, key=lambda server: server.epoch)

    def _happen(self, fault: Fault) -> None:
        servers, network, seconds = self._servers[fault.shard], self._network, fault.seconds
        newest = servers[-1]
        if fault.kind in ("cut", "twice"):
            getattr(network, fault.kind)(fault.shard)
        elif fault.kind in ("hold", "slow"):
            getattr(network, fault.kind)(fault.shard, seconds)
        elif fault.kind in ("kill", "power"):
            newest.die_after(fault.calls)
            self.scheduler.after(seconds, lambda: self._restart(fault, newest))
        elif fault.kind in ("pause", "replace"):
            newest.process.paused = not newest.process.dead
            if fault.kind == "replace":
                self._start(fault.shard)
            self.scheduler.after(seconds, lambda: setattr(newest.process, "paused", False))
        elif fault.kind == "overtake":
            self._start(fault.shard)
        else:
            self._stale_until[fault.shard] = self.scheduler.now + seconds

    def _restart(self, fault: Fault, victim: SimulatedServer) -> None:
        """End the victim now at the latest, and start a new process; with a loss of power from what the disk has left.

        A victim that was forgotten would claim the shard when it goes on, and end with nobody to take its place.
        """
        if fault.kind == "power":
            for server in self._servers[fault.shard]:
                self.scheduler.kill(server.process)
        else:
            self.scheduler.kill(victim.process)
        self.scheduler.after(0.0, lambda: self._started_again(fault))

    def _started_again(self, fault: Fault) -> None:
        if fault.kind == "power":
            self._disks[fault.shard].lose_power(self.scheduler)
        self._start(fault.shard)

    # --- clients -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        def opened(target: str, options: Any = None) -> Channel:
            return Channel(self._network, int(target.rpartition(":")[2]) - _PORT)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(grpc, "insecure_channel", opened)
            yield

    def _train(self, worker: int) -> None:
        shape, scheduler = self.shape, self.scheduler
        retry = stepwire.Retry(clock=scheduler.clock, sleep=scheduler.sleep, uniform=scheduler.chance.uniform)
        targets = [f"127.0.0.1:{_PORT + shard}" for shard in range(shape.shards)]
        client = stepwire.connect(targets, transport="tcp", timeout=_TIMEOUT_SECONDS, retry=retry)
        self._clients.append(client)  # its end is not part of the history
        session = self._until_told(lambda: self._created(client, worker))
        self._clients.append(session)
        for step in range(shape.steps):
            self._step(session, worker * shape.steps + step)
        self._finished += 1

    def _created(self, client: Any, worker: int) -> Any:
        zeros = {f"w{shard}": np.zeros(self.shape.size, np.float32) for shard in range(self.shape.shards)}
        workers = self.shape.workers
        together = stepwire.Aggregation(workers=workers, reduction="sum", round_timeout=20.0) if workers > 1 else None
        return client.create_session(
            zeros,
            optimizer=stepwire.SGD(lr=1.0),
            durability="journal",
            request_id="job",
            non_finite="reject" if self.shape.two_phase else "allow",
            aggregation=together,
            worker=worker,
        )

    def _step(self, session: Any, number: int) -> None:
        gradient = np.zeros(self.shape.size, np.float32)
        gradient[number] = 1.0
        self._sent.add(number)
        while True:
            reply = self._until_told(lambda: session.step({name: gradient for name in session.shapes}))
            result = session.last_result
            self._check_reply(number, reply, result)
            if result.round is None or not result.round.dropped:
                self._told.add(number)
                self._check_all()
                return

    def _until_told(self, call: Any) -> Any:
        """Make a call until it succeeds, as a program does that goes on after what may be repeated."""
        end = self.scheduler.now + _PATIENCE_SECONDS
        while True:
            try:
                return call()
            except StepwireError as error:
                self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
                if not may_be_repeated(error):
                    raise Broken(f"a client met {error.reason}: {error}") from error
                if self.scheduler.now > end:
                    raise Broken(f"no success within {_PATIENCE_SECONDS} s; at last {error.reason}: {error}") from error
            self.scheduler.sleep(0.1)

    # --- invariants --------------------------------------------------------------------------------------

    def _check_reply(self, number: int, reply: Any, result: Any) -> None:
        """The parameters of a success have the step, everything that was told, nothing twice; all shards agree."""
        shards = [reply[name] for name in sorted(reply)]
        for values in shards[1:]:
            if values.tobytes() != shards[0].tobytes():
                raise Broken(f"the shards differ in the reply to gradient {number}")
        applied = applied_in(shards[0], f"the reply to gradient {number}")
        dropped = result.round is not None and result.round.dropped
        if number in applied and dropped or number not in applied and not dropped:
            raise Broken(f"gradient {number} was {'dropped' if dropped else 'told'}, and its reply has {applied}")
        own = {told for told in self._told if told // self.shape.steps == number // self.shape.steps}
        if not own <= applied <= self._sent:
            raise Broken(f"the reply to gradient {number} has {applied}; told {own}, sent {self._sent}")
        if self.shape.workers == 1 and applied != self._told | {number}:
            raise Broken(f"the reply to gradient {number} has {applied}; told before {self._told}")
        known = self._replies.setdefault(result.step, shards[0].tobytes())
        if known != shards[0].tobytes():
            raise Broken(f"two replies of step {result.step} differ")

    def _check(self) -> None:
        if self.scheduler.failures:
            name, failure = self.scheduler.failures[0]
            raise failure if isinstance(failure, Broken) else Broken(f"{name} ended: {failure!r}") from failure
        if self.scheduler.events % _OFTEN == 0:
            self._check_all()

    def _check_all(self) -> None:
        for servers in self._servers:
            owner = max(servers, key=lambda server: server.epoch)
            if owner.is_open and not owner.process.dead:
                self._check_state(owner)

    def _recovered(self, server: SimulatedServer) -> None:
        """Nothing that was told is lost at a start; a session may stay parked until somebody asks for it.

        A server that was overtaken while it started knows nothing of what its successor has told.
        """
        assert server.registry is not None
        if self.scheduler.chance.random() < 0.7:
            for session_id in set(server.registry._parked.values()):
                server.registry.get(session_id)
        if server.is_newest:
            self._check_state(server)

    def _check_state(self, server: SimulatedServer) -> None:
        values = parameters_of(server, self.shape.size)
        if values is None:
            if self._told and not server.is_parked:
                raise Broken(f"{server.process.name} has no session, and {self._told} were told")
            return
        applied = applied_in(values, server.process.name)
        if not self._told <= applied <= self._sent:
            raise Broken(f"{server.process.name} has {applied}; told {self._told}, sent {self._sent}")


def applied_in(values: npt.NDArray[np.float32], place: str) -> set[int]:
    (moved,) = np.nonzero(values)
    if set(values[moved].tolist()) - {-1.0}:
        raise Broken(f"{place} has a gradient twice: {values[moved]}")
    return set(moved.tolist())


def may_be_repeated(error: StepwireError) -> bool:
    if isinstance(error, FencedError):
        return error.reason in (Reason.NOT_PRIMARY, Reason.STALE_EPOCH)
    return isinstance(error, UnavailableError | DeadlineExceededError | NotEnoughWorkersError | StateChangedError)
