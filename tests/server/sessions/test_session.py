"""One session: all of a step or none of it, on an engine that can be made to fail."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stepwire import errors
from stepwire.layout import TensorSpec
from stepwire.optimizers import Adam
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.wire.dtypes import FLOAT16, FLOAT32, INT8
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config

PATIENCE_SECONDS = 30.0
SIZE = 262
PLAN = make_config(
    TensorSpec("a", (2, 3)),
    TensorSpec("b", (4,)),
    TensorSpec("c", (6,), 1),
    optimizer=Adam(lr=0.5),
    groups=(Adam(lr=0.5).hyperparameters(), Adam(lr=0.25).hyperparameters()),
)
STATE_BYTES = 3 * 4 * SIZE


class Failure(Exception):
    """What a broken device raises."""


class Engine(CpuEngine):
    """An engine whose calls are noted, and fail or wait where a test says so.

    Attributes:
        calls: names of the calls that change or prepare something.
        trouble: called with each name before the call.
    """

    def __init__(self) -> None:
        super().__init__(threads=1, use_numba=False)
        self.calls: list[str] = []
        self.trouble: Callable[[str], None] = lambda name: None

    def note(self, name: str) -> None:
        self.trouble(name)
        self.calls.append(name)

    def allocate(self, *arguments: Any) -> Any:
        self.note("allocate")
        return State(self, super().allocate(*arguments))

    def prepare(self, *arguments: Any) -> None:
        self.note("prepare")
        super().prepare(*arguments)


class State:
    """A CPU state behind an engine that watches."""

    def __init__(self, engine: Engine, state: Any) -> None:
        self._engine = engine
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def update(self, *arguments: Any) -> Any:
        self._engine.note("update")
        return self._state.update(*arguments)

    def adopt(self, other: Any) -> None:
        self._engine.note("adopt")
        self._state.adopt(other._state)


class Sink:
    """Takes an answer as a list of chunks."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.chunks: list[tuple[int, npt.NDArray[Any]]] = []
        self.flushed = 0
        self._dtype = dtype

    def buffer(self, offset: int, count: int) -> npt.NDArray[Any]:
        self.chunks.append((offset, np.full(count, 77, self._dtype)))
        return self.chunks[-1][1]

    def flush(self) -> None:
        self.flushed += 1

    def values(self) -> npt.NDArray[Any]:
        return np.concatenate([values for _, values in self.chunks])


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(100_000)


@pytest.fixture
def make(engine: Engine, budget: MemoryBudget, clock: Any) -> Callable[..., Session]:
    """Make a session whose slot is held with token 1."""

    def create(config: SessionConfig = PLAN) -> Session:
        session = Session("ab" * 16, config, engine, budget, epoch=1, clock=clock)
        session.take_slot()
        return session

    return create


def request(step: int, **fields: Any) -> StepRequest:
    return StepRequest(step, 0, FLOAT32, FLOAT32, True, 1 << 20, PLAN.groups)._replace(**fields)


def gradient(seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def take(session: Session, wanted: StepRequest, values: Any = None, cuts: Sequence[int] = ()) -> tuple[Any, Sink]:
    """Take a step in chunks cut at `cuts`."""
    values = (gradient(wanted.step) if values is None else values).astype(wanted.gradient_dtype)
    sink = Sink(wanted.reply_dtype)
    staging = session.begin(wanted, 1)
    try:
        edges = [0, *cuts, SIZE]
        for start, end in zip(edges, edges[1:], strict=False):
            staging.add(start, end - start, np.frombuffer(values[start:end].tobytes(), np.uint8))
        return session.commit(wanted, staging, 1, sink, 0.0), sink
    finally:
        staging.close()


def everything(session: Session) -> tuple[Any, ...]:
    snapshot = session.snapshot()
    slots = {}
    for slot in session.slots:
        out = np.empty(SIZE, np.float32)
        session.read(snapshot, slot, 0, out)
        slots[slot] = out.tobytes()
    return snapshot, slots


def test_a_session_reserves_before_it_allocates(make: Any, engine: Engine, budget: MemoryBudget) -> None:
    reserved: list[int] = []
    engine.trouble = lambda name: reserved.append(budget.reserved_bytes)
    session = make()
    assert engine.calls[0] == "allocate"
    assert reserved[0] == STATE_BYTES == session.memory_bytes
    session.close()
    session.close()
    assert budget.reserved_bytes == 0


@pytest.mark.parametrize("broken", ["allocate", "prepare"])
def test_a_session_that_cannot_be_made_gives_its_memory_back(
    make: Any, engine: Engine, budget: MemoryBudget, broken: str
) -> None:
    def trouble(name: str) -> None:
        if name == broken:
            raise Failure

    engine.trouble = trouble
    with pytest.raises(Failure):
        make()
    assert budget.reserved_bytes == 0


def test_kernels_are_made_when_a_session_is_created_and_not_in_its_steps(make: Any, engine: Engine) -> None:
    session = make()
    assert engine.calls.count("prepare") >= 1
    engine.calls.clear()
    take(session, request(1))
    take(session, request(2))
    assert "prepare" not in engine.calls


def test_a_step_updates_each_group_with_its_own_numbers_and_answers_padding_with_zeros(make: Any) -> None:
    session = make()
    record, sink = take(session, request(1))
    values, signs = sink.values(), np.sign(gradient(1))
    np.testing.assert_allclose(values[:10], -0.5 * signs[:10], rtol=1e-5)
    np.testing.assert_allclose(values[256:], -0.25 * signs[256:], rtol=1e-5)
    assert values[10:256].tolist() == [0.0] * 246
    assert (record.step, record.replayed, [group.t for group in record.groups]) == (1, False, [1, 1])
    assert everything(session)[1]["param"] == values.tobytes()


@pytest.mark.parametrize("cuts", [(), (1,), (10, 256), (5, 100, 258), tuple(range(1, SIZE))])
@pytest.mark.parametrize("most", [1, 3, 100, 1 << 20])
def test_neither_cuts_nor_the_size_of_answers_change_a_bit(make: Any, cuts: Any, most: int) -> None:
    plain, cut = make(), make()
    for step in (1, 2):
        _, expected = take(plain, request(step))
        _, sink = take(cut, request(step, reply_elements=most), cuts=cuts)
        assert sink.values().tobytes() == expected.values().tobytes()
        assert max(len(values) for _, values in sink.chunks) <= most
        assert sink.flushed == len(sink.chunks)
        ends = np.cumsum([len(values) for _, values in sink.chunks]).tolist()
        assert [offset for offset, _ in sink.chunks] == [0, *ends[:-1]]
    assert everything(cut) == everything(plain)


def test_a_step_without_an_answer_is_the_same_step(make: Any) -> None:
    plain, silent = make(), make()
    take(plain, request(1))
    _, sink = take(silent, request(1, reply=False))
    assert (sink.chunks, sink.flushed) == ([], 0)
    assert everything(silent) == everything(plain)


def test_a_replay_says_what_was_said_and_changes_nothing(make: Any) -> None:
    session = make()
    record, sink = take(session, request(1))
    before = everything(session)
    for dtype in (FLOAT32, FLOAT16):
        again, replayed = take(session, request(1, reply_dtype=dtype, reply_elements=50), gradient(99))
        assert again == record.replay()
        assert replayed.values().tobytes() == sink.values().astype(dtype).tobytes()
    assert everything(session) == before


def test_a_skipped_step_sends_the_parameters_as_they_are(make: Any) -> None:
    session = make(dataclasses.replace(PLAN, treatment=GradientTreatment(non_finite="skip")))
    take(session, request(1))
    snapshot, slots = everything(session)
    bad = gradient(2)
    bad[3] = np.nan
    record, sink = take(session, request(2), bad)
    assert (record.skipped, record.non_finite_count, [group.t for group in record.groups]) == (True, 1, [1, 1])
    assert sink.values().tobytes() == slots["param"]
    assert everything(session) == (snapshot._replace(step=2), slots)


def test_a_step_that_is_refused_at_its_commit_has_touched_nothing(make: Any, engine: Engine) -> None:
    session = make()
    take(session, request(1))
    before = everything(session)
    engine.calls.clear()
    bad = gradient(2)
    bad[258] = np.inf
    with pytest.raises(errors.NonFiniteGradientError, match="'c'"):
        take(session, request(2), bad)
    staging = session.begin(request(2), 1)
    with pytest.raises(errors.InvalidRequestError, match=r"\[0, 10\) were not sent"):
        session.commit(request(2), staging, 1, Sink(), 0.0)
    staging.close()
    assert "update" not in engine.calls
    assert everything(session) == before
    take(session, request(2))


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_commit_that_fails_half_way_damages_the_session_for_ever(
    make: Any, engine: Engine, budget: MemoryBudget, fails_at: int
) -> None:
    """Some ranges are stepped and some are not: better no answer than that one."""
    session = make()
    take(session, request(1))
    updates = 0

    def trouble(name: str) -> None:
        nonlocal updates
        updates += name == "update"
        if updates == fails_at:
            raise Failure

    engine.trouble = trouble
    with pytest.raises(Failure):
        take(session, request(2), cuts=(5, 10, 256))
    engine.trouble = lambda name: None
    assert budget.reserved_bytes == STATE_BYTES
    for call in (
        lambda: take(session, request(2)),
        lambda: take(session, request(1)),
        lambda: take(session, request(3)),
        session.snapshot,
        lambda: session.admit_load(1, 1, None),
    ):
        with pytest.raises(errors.DataLossError, match="damaged when step 2 failed half-way"):
            call()
    assert session.ledger.applied_step == 1
    session.close()
    assert budget.reserved_bytes == 0


def test_an_answer_that_cannot_be_held_damages_too(make: Any) -> None:
    session = make()

    class Full(Sink):
        def buffer(self, offset: int, count: int) -> npt.NDArray[Any]:
            if offset:
                raise MemoryError
            return super().buffer(offset, count)

    wanted = request(1, reply_elements=100)
    staging = session.begin(wanted, 1)
    staging.add(0, SIZE, np.frombuffer(gradient().tobytes(), np.uint8))
    with pytest.raises(MemoryError):
        session.commit(wanted, staging, 1, Full(), 0.0)
    staging.close()
    with pytest.raises(errors.DataLossError):
        session.snapshot()


def load(session: Session, number: int, **slots: npt.NDArray[np.float32]) -> bool:
    """Load whole slots."""
    names = tuple(slots)
    staged, room = session.stage_load(names)
    with room:
        for slot, values in slots.items():
            staged.write(slot, 0, values)
        return session.commit_load(staged, names, 1, number, None, [])


def test_a_load_replaces_its_slots_and_leaves_the_others(make: Any, budget: MemoryBudget) -> None:
    session = make()
    take(session, request(1))
    _, before = everything(session)
    assert load(session, 1, exp_avg=gradient(5)) is True
    snapshot, after = everything(session)
    assert after == before | {"exp_avg": gradient(5).tobytes()}
    assert (snapshot.step, snapshot.load, snapshot.tensor_steps) == (1, 1, (1, 1, 1))
    assert load(session, 1, exp_avg=gradient(6)) is False
    assert everything(session) == (snapshot, after)
    assert budget.reserved_bytes == STATE_BYTES


def test_a_load_that_fails_half_way_damages_the_session(make: Any, engine: Engine) -> None:
    session = make()

    def trouble(name: str) -> None:
        if name == "adopt":
            raise Failure

    engine.trouble = trouble
    with pytest.raises(Failure):
        load(session, 1, param=gradient())
    with pytest.raises(errors.DataLossError, match="damaged when load 1 failed half-way"):
        session.snapshot()


def test_a_load_that_cannot_be_staged_gives_its_memory_back(make: Any, engine: Engine, budget: MemoryBudget) -> None:
    session = make()

    def trouble(name: str) -> None:
        raise Failure

    engine.trouble = trouble
    with pytest.raises(Failure):
        session.stage_load(("param",))
    assert budget.reserved_bytes == STATE_BYTES


def test_a_pull_is_of_one_moment(make: Any) -> None:
    session = make()
    for change in (lambda: take(session, request(1)), lambda: load(session, 1, param=gradient())):
        snapshot = session.snapshot()
        change()
        with pytest.raises(errors.StateChangedError, match="pull again"):
            session.read(snapshot, "param", 0, np.empty(SIZE, np.float32))


def test_a_gradient_is_reserved_for_at_its_begin_and_given_back_at_its_end(make: Any, budget: MemoryBudget) -> None:
    session = make()
    for dtype, reply, nbytes in (
        (FLOAT32, FLOAT32, 4 * SIZE),
        (FLOAT16, FLOAT16, 2 * SIZE),
        (FLOAT16, FLOAT32, 4 * SIZE),
        (INT8, FLOAT32, 4 * SIZE),
        (INT8, FLOAT16, 2 * SIZE),
    ):
        staging = session.begin(request(1, gradient_dtype=dtype, reply_dtype=reply), 1)
        assert budget.reserved_bytes == STATE_BYTES + nbytes
        staging.close()
        assert budget.reserved_bytes == STATE_BYTES


def test_closing_waits_for_the_commit_under_way(make: Any, engine: Engine, budget: MemoryBudget) -> None:
    session = make()
    inside, go_on = threading.Event(), threading.Event()
    records: list[Any] = []

    def trouble(name: str) -> None:
        if name == "update":
            inside.set()
            assert go_on.wait(PATIENCE_SECONDS)

    engine.trouble = trouble
    stepping = threading.Thread(target=lambda: records.append(take(session, request(1))[0]))
    closing = threading.Thread(target=session.close)
    stepping.start()
    assert inside.wait(PATIENCE_SECONDS)
    closing.start()
    assert closing.is_alive()
    go_on.set()
    for thread in (stepping, closing):
        thread.join(PATIENCE_SECONDS)
    assert [record.step for record in records] == [1]
    assert (session.ledger.closed, budget.reserved_bytes) == (True, 0)


def test_a_step_that_began_before_the_end_is_not_found_at_its_commit(make: Any, budget: MemoryBudget) -> None:
    session = make()
    staging = session.begin(request(1), 1)
    session.close()
    staging.add(0, SIZE, np.frombuffer(gradient().tobytes(), np.uint8))
    with pytest.raises(errors.SessionNotFoundError):
        session.commit(request(1), staging, 1, Sink(), 0.0)
    staging.close()
    assert budget.reserved_bytes == 0


def test_times_are_told_by_the_sessions_clock(make: Any, engine: Engine, clock: Any) -> None:
    session = make()

    def trouble(name: str) -> None:
        clock.now += 2.0 if name == "update" else 0.0

    engine.trouble = trouble
    began = clock.now
    clock.now += 5.0
    staging = session.begin(request(1), 1)
    staging.add(0, SIZE, np.frombuffer(gradient().tobytes(), np.uint8))
    record = session.commit(request(1), staging, 1, Sink(), began)
    staging.close()
    assert (record.receive_seconds, record.queue_seconds, record.apply_seconds) == (5.0, 0.0, 4.0)


def test_the_norm_is_that_of_the_whole_gradient(make: Any) -> None:
    record, _ = take(make(), request(1))
    values = gradient(1).astype(np.float64)
    squares = [float((values[start:end] ** 2).sum()) for start, end in ((0, 10), (256, SIZE))]
    assert [group.grad_norm for group in record.groups] == [float(np.float32(np.sqrt(square))) for square in squares]
    assert record.grad_norm == float(np.float32(np.sqrt(sum(squares))))
