"""Several workers train one model that moves between servers: the bits of one worker of a model that stays."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.links import pull_and_load
from stepwire.sharding.move import Move
from stepwire_server.durability.moved import MovedSession, MovedSessions
from stepwire_server.server import Server
from tests.integration.sharding.test_broken_moves import METHODS, Broken, Killed, Places, kill
from tests.integration.workers.together import exact_mean, gradients, together
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

WORKERS, SIZE = 3, 100_000
PLACES = ((), (1,), (2, 3), (0, 1, 4), (3,), (2, 0), (2,))
GIVEN = gradients(WORKERS, len(PLACES), SIZE)
ZEROS = {"w": np.zeros(SIZE, np.float32)}
ADAM = stepwire.AdamW(lr=0.1)
ROUNDS = stepwire.Aggregation(workers=WORKERS)


class Workers:
    """The workers of one session, each with a client of its own."""

    def __init__(
        self, stack: contextlib.ExitStack, targets: list[str], transport: str = "tcp", shards: int = 1, **options: Any
    ) -> None:
        self._targets = targets
        found: Any = targets[0] if shards == 1 else targets[:shards]
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        self._clients: list[Any] = [
            stack.enter_context(stepwire.connect(found, transport=transport, timeout=60.0, retry=retry))
            for _ in range(WORKERS)
        ]
        self.options = {"optimizer": ADAM, "aggregation": ROUNDS, "request_id": uuid.uuid4().hex} | options
        self.sessions: list[Any] = []
        self._present = ""

    def join(self, worker: int | str, client: int = 0) -> Any:
        """Make a session, or find it."""
        session: Any = self._clients[client].create_session(ZEROS, worker=worker, **self.options)
        self.sessions.append(session)
        return session

    def join_all(self) -> Workers:
        for worker in range(WORKERS):
            self.join(worker, worker)
        return self

    def move(self, *onto: int) -> str:
        """Move the session from wherever it is."""
        former, places = self._present or self.sessions[0].session_id, [self._targets[each] for each in onto]
        self._present = stepwire.move_session(former, self._targets, places)
        return self._present

    def step(self, step: int) -> list[bytes]:
        return together(*self.calls(step))

    def calls(self, step: int) -> list[Any]:
        return [functools.partial(self._stepped, session, GIVEN[i][step]) for i, session in enumerate(self.sessions)]

    @staticmethod
    def _stepped(session: Any, gradient: Any) -> bytes:
        found: bytes = session.step(gradient)["w"].tobytes()
        return found


@pytest.fixture(scope="module")
def targets(servers: list[Server]) -> list[str]:
    return [server.target for server in servers]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@functools.cache
def expected(clip_grad_norm: float | None = None) -> list[bytes]:
    """Return the parameters of one worker that is fed the means."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session: Any = client.create_session(ZEROS, optimizer=ADAM, clip_grad_norm=clip_grad_norm)
        means = [exact_mean([worker[step] for worker in GIVEN]) for step in range(len(PLACES))]
        return [session.step(mean)["w"].tobytes() for mean in means]


@pytest.mark.parametrize("transport", ["tcp", "auto"])
@pytest.mark.parametrize("bound", [None, 0.5], ids=["plain", "clipped"])
def test_rounds_go_on_with_the_same_bits_while_the_model_moves(
    targets: list[str], stack: contextlib.ExitStack, transport: str, bound: float | None
) -> None:
    workers = Workers(stack, targets, transport, clip_grad_norm=bound).join_all()
    for step, onto in enumerate(PLACES):
        move = [functools.partial(workers.move, *onto)] if onto else []
        found = together(*workers.calls(step), *move)
        assert found[:WORKERS] == [expected(bound)[step]] * WORKERS
        for session in workers.sessions:
            part = session.last_result.round
            assert (session.applied_step, part.contribution, part.dropped) == (step + 1, step + 1, False)
    assert {session.pull()["w"].tobytes() for session in workers.sessions} == {expected(bound)[-1]}
    assert {len(session.shards) for session in workers.sessions} == {1}


@pytest.mark.parametrize(
    "way", [{"mode": "async"}, {"mode": "async", "max_clock_lead": 1}, {"required_workers": 2}], ids=str
)
def test_each_gradient_counts_once_whatever_the_way_and_the_moves(
    targets: list[str], stack: contextlib.ExitStack, way: dict[str, Any]
) -> None:
    """Each gradient moves an element of its own; in rounds of some workers, those that are told as dropped do not.

    A worker that is left alone has no round any more, and gives up the gradients that it has left.
    """
    reduction = {} if "mode" in way else {"reduction": "sum", "round_timeout": 0.5}
    aggregation = stepwire.Aggregation(workers=WORKERS, **way, **reduction)
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": aggregation, "non_finite": "allow"}
    workers = Workers(stack, targets, **options).join_all()
    counted, gone, steps = [set[int]() for _ in range(WORKERS)], set[int](), 8

    def is_alone() -> bool:
        return "mode" not in way and len(gone) == WORKERS - 1

    def train(worker: int) -> None:
        session = workers.sessions[worker]
        for step in range(steps):
            one = np.zeros(SIZE, np.float32)
            one[worker * steps + step] = 1.0
            while not is_alone():
                with contextlib.suppress(stepwire.NotEnoughWorkersError):
                    session.step({"w": one})
                    break
            else:
                return
            if not session.last_result.round.dropped:
                counted[worker].add(worker * steps + step)
        session.detach()  # nobody waits for a worker that has gone
        gone.add(worker)

    def wander() -> None:
        for onto in ((1,), (2,), (3, 4), (0,)) if "mode" in way else ((1,), (2,), (3,)):
            workers.move(*onto)

    together(*(functools.partial(train, worker) for worker in range(WORKERS)), wander)
    parameters = workers.sessions[0].pull()["w"]
    assert set(np.nonzero(parameters)[0].tolist()) == set().union(*counted)
    assert set(parameters[parameters != 0].tolist()) == {-1.0}


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
@pytest.mark.parametrize("applied", [True, False])
def test_a_contribution_whose_reply_was_lost_before_a_move_counts_once(
    targets: list[str], stack: contextlib.ExitStack, onto: tuple[int, ...], applied: bool
) -> None:
    workers = Workers(stack, targets).join_all()
    workers.step(0)
    with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
        workers.step(1)
    workers.move(*onto)
    assert workers.step(1) == [expected()[1]] * WORKERS
    results = [session.last_result for session in workers.sessions]
    assert [(each.step, each.round.contribution, each.replayed) for each in results] == [(2, 2, applied)] * WORKERS
    assert [part.worker for part in results[0].round.contributors] == [0, 1, 2]
    assert workers.step(2) == [expected()[2]] * WORKERS


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
def test_workers_join_and_are_fenced_where_the_model_is(
    targets: list[str], stack: contextlib.ExitStack, onto: tuple[int, ...]
) -> None:
    workers = Workers(stack, targets)
    for worker in (0, 1):
        workers.join(worker, worker).attach()
    fenced = workers.join(1, 1)
    workers.sessions[1].attach()
    fenced.attach(take_over=True)
    found = workers.move(*onto)
    late = workers.join(2, 2)
    assert late.session_id == found, "the request of the creation finds the session where it is"
    with pytest.raises(stepwire.FencedError):
        workers.sessions[1].step(GIVEN[1][0])
    workers.sessions[:] = [workers.sessions[0], fenced, late]
    assert workers.step(0) == [expected()[0]] * WORKERS
    late.detach()
    workers.sessions.remove(late)
    workers.join(2, 2)
    assert workers.step(1) == [expected()[1]] * WORKERS, "a worker that comes back is the same one"


def test_a_worker_that_the_server_chose_stays_the_one_that_it_is(
    targets: list[str], stack: contextlib.ExitStack
) -> None:
    workers = Workers(stack, targets)
    for client in range(WORKERS):
        workers.join("any", client).attach()
    assert [session.worker for session in workers.sessions] == [0, 1, 2]
    workers.move(1)
    pauses: list[float] = []

    def given_up(seconds: float) -> None:
        pauses.append(seconds)
        raise InterruptedError

    impatient = stepwire.Retry(sleep=given_up)
    with stepwire.connect(targets[0], retry=impatient) as newcomer, pytest.raises(InterruptedError) as refused:
        newcomer.create_session(ZEROS, worker="any", **workers.options).attach()
    assert isinstance(refused.value.__context__, stepwire.ResourceExhaustedError)
    assert len(pauses) == 1
    assert workers.step(0) == [expected()[0]] * WORKERS
    workers.move(2, 3)
    assert workers.step(1) == [expected()[1]] * WORKERS
    assert [session.worker for session in workers.sessions] == [0, 1, 2]


@pytest.mark.parametrize("onto", [(1,), (2, 3)])
def test_a_round_of_some_workers_awaits_all_that_follow(
    targets: list[str], stack: contextlib.ExitStack, onto: tuple[int, ...]
) -> None:
    aggregation = stepwire.Aggregation(workers=WORKERS, required_workers=2, least_grace=100.0, most_grace=100.0)
    workers = Workers(stack, targets, aggregation=aggregation, non_finite="allow").join_all()
    for session in workers.sessions:
        session.attach()
    workers.move(*onto)
    assert workers.step(0) == [expected()[0]] * WORKERS
    assert all(len(session.last_result.round.contributors) == WORKERS for session in workers.sessions)


def test_of_several_servers_none_chooses_the_worker(targets: list[str], stack: contextlib.ExitStack) -> None:
    workers = Workers(stack, targets)
    workers.join(0).attach()
    undecided = workers.join("any", 1)
    workers.move(2, 3)
    for call in (undecided.attach, lambda: workers.join("any", 2)):
        with pytest.raises(stepwire.InvalidRequestError, match="each of several servers would choose for itself"):
            call()


@pytest.mark.many
@pytest.mark.parametrize("after", [False, True], ids=["unsent", "unheard"])
@pytest.mark.parametrize("onto", [(1,), (1, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_mover_that_ends_anywhere_loses_no_contribution(
    method: str, onto: tuple[int, ...], after: bool, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Move, "_undo", lambda self: None)  # a process that has ended undoes nothing
    now = [0.0]
    servers = [stack.enter_context(numpy_server(clock=lambda: now[0])) for _ in range(3)]
    workers = Workers(stack, [server.target for server in servers]).join_all()
    assert workers.step(0) == [expected()[0]] * WORKERS
    broken = Broken(method, 1, kill, after=after)
    with broken.watching(), contextlib.suppress(Killed):
        workers.move(*onto)
    assert broken.happened
    now[0] += 60.0  # nobody renews the freeze
    assert workers.step(1) == [expected()[1]] * WORKERS
    assert len(workers.sessions[0].shards) == (len(onto) if (method, after) == (METHODS[-1], True) else 1)
    workers.move(*onto)
    assert workers.step(2) == [expected()[2]] * WORKERS


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_a_server_that_starts_again_behind_a_move_knows_every_worker(
    durability: Any, stack: contextlib.ExitStack, tmp_path: pathlib.Path
) -> None:
    places = Places(tmp_path, stack)
    for name in ("a", "b"):
        places.serve(name)
    targets = [places.target(name) for name in ("a", "b")]
    options: dict[str, Any] = {"durability": durability, "keep": True}
    workers = Workers(stack, targets, **options).join_all()
    assert workers.step(0) == [expected()[0]] * WORKERS
    workers.move(1)
    places.serve("b")  # another process, which overtakes the one that has the session
    assert workers.step(1) == [expected()[1]] * WORKERS
    results = [session.last_result for session in workers.sessions]
    assert [(each.step, each.round.contribution) for each in results] == [(2, 2)] * WORKERS


def test_shards_whose_workers_cannot_come_together_are_refused(
    targets: list[str], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of one shard alone, whose workers have given up: the mover waits for them, and says what to do."""
    monkeypatch.setattr("stepwire.sharding.move._REST_SECONDS", 0.5)
    options: dict[str, Any] = {"optimizer": ADAM, "aggregation": ROUNDS, "request_id": uuid.uuid4().hex}
    options["non_finite"] = "allow"  # each shard decides by itself
    clients = [
        stack.enter_context(stepwire.connect(targets[:2], transport="tcp", timeout=60.0)) for _ in range(WORKERS)
    ]
    sessions: list[Any] = [
        client.create_session(ZEROS, worker=worker, **options) for worker, client in enumerate(clients)
    ]
    for session in sessions:
        session.attach()
    alone = [session.shards[0] for session in sessions]
    part = {name: np.ones(shape, np.float32) for name, shape in alone[0].shapes.items()}
    together(*(functools.partial(shard.step, part) for shard in alone))
    with pytest.raises(stepwire.StepMismatchError, match=r"at the steps \[1, 0\], and their clients do not finish"):
        stepwire.move_session(sessions[0].session_id, targets, targets[2:3])


@pytest.mark.parametrize("onto", [(), (3,), (2, 4)])
def test_a_gradient_of_old_parameters_stays_old_behind_a_move(
    targets: list[str], stack: contextlib.ExitStack, onto: tuple[int, ...]
) -> None:
    aggregation = stepwire.Aggregation(workers=WORKERS, mode="async", max_staleness_steps=1)
    workers = Workers(stack, targets, aggregation=aggregation, optimizer=stepwire.SGD(lr=1.0)).join_all()
    first, second, _ = workers.sessions
    first.attach()
    for _ in range(5):
        second.step({"w": np.ones(SIZE, np.float32)})
    if onto:
        workers.move(*onto)
    first.step({"w": np.full(SIZE, 100.0, np.float32)})
    told = first.last_result.round
    assert (told.dropped, told.staleness) == (True, 5)
    assert set(first.pull()["w"].tolist()) == {-5.0}


@pytest.mark.parametrize("onto", [(), (3,), (2, 4)])
@pytest.mark.parametrize("former", [1, 2])
@pytest.mark.parametrize("way", [{}, {"mode": "async"}], ids=["rounds", "async"])
def test_a_load_of_another_worker_is_noticed_behind_a_move(
    targets: list[str], stack: contextlib.ExitStack, way: dict[str, Any], former: int, onto: tuple[int, ...]
) -> None:
    aggregation = stepwire.Aggregation(workers=WORKERS, **way)
    options: dict[str, Any] = {"aggregation": aggregation, "optimizer": stepwire.SGD(lr=1.0)}
    workers = Workers(stack, targets, shards=former, **options).join_all()
    first, second, _ = workers.sessions
    first.attach()
    second.load({"w": np.full(SIZE, 1000.0, np.float32)})
    if onto:
        workers.move(*onto)
    with pytest.raises(stepwire.StepMismatchError, match=r"another worker loaded it; pull the parameters"):
        first.step({"w": np.ones(SIZE, np.float32)})
    assert set(first.pull()["w"].tolist()) == {1000.0}


@pytest.mark.parametrize("onto", [(), (3,), (2, 4)])
def test_a_load_whose_reply_was_lost_before_a_move_is_committed_once(
    targets: list[str], stack: contextlib.ExitStack, onto: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has stepped behind it by then, and the step stays."""
    aggregation = stepwire.Aggregation(workers=WORKERS, mode="async")
    workers = Workers(stack, targets, aggregation=aggregation, optimizer=stepwire.SGD(lr=1.0)).join_all()
    first, second, _ = workers.sessions
    first.attach()
    send = pull_and_load.send_load

    def lost(*given: Any) -> Any:
        send(*given)
        monkeypatch.setattr(pull_and_load, "send_load", send)
        second.pull()
        second.step({"w": np.ones(SIZE, np.float32)})
        if onto:
            workers.move(*onto)
        raise stepwire.UnavailableError("the reply was lost", reason=stepwire.Reason.UNREACHABLE)

    monkeypatch.setattr(pull_and_load, "send_load", lost)
    first.load({"w": np.full(SIZE, 1000.0, np.float32)})
    assert set(second.pull()["w"].tolist()) == {999.0}
    assert first.statistics().applied_load == second.statistics().applied_load


@pytest.mark.parametrize("workers", [1, 2])
def test_a_record_that_a_disk_refuses_once_is_kept_in_the_end(
    workers: int, stack: contextlib.ExitStack, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path, stack)
    for name in ("a", "b"):
        places.serve(name)
    targets = [places.target(name) for name in ("a", "b")]
    several = {"aggregation": stepwire.Aggregation(workers=workers, mode="async")} if workers > 1 else {}
    client = stack.enter_context(stepwire.connect(targets[0], timeout=120.0))
    session = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0), durability="journal", keep=True, **several)
    ones = {"w": np.ones(SIZE, np.float32)}
    session.step(ones)
    add = MovedSessions.add

    def refused(self: MovedSessions, record: MovedSession, *, durable: bool) -> None:
        monkeypatch.setattr(MovedSessions, "add", add)
        raise stepwire.DataLossError("the disk failed", reason=stepwire.Reason.DURABILITY_FAILED)

    monkeypatch.setattr(MovedSessions, "add", refused)
    moved = stepwire.move_session(session.session_id, targets, targets[1:])
    assert set(session.step(ones)["w"].tolist()) == {-2.0}
    assert session.session_id == moved
