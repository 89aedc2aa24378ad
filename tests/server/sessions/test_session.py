"""One session: all of a step or none of it, on an engine that can be made to fail."""

from __future__ import annotations

import dataclasses
import itertools
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
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config
from tests.server.session_driver import (
    RecordingWriter,
    begin,
    bring,
    commit_load,
    holder_of,
    make_session,
    stage,
)
from tests.server.session_driver import everything as pull_everything
from tests.server.sessions.watched_engine import Failure, WatchedEngine

PATIENCE_SECONDS = 120.0
SIZE = 262
CONFIG = make_config(
    TensorSpec("a", (2, 3)),
    TensorSpec("b", (4,)),
    TensorSpec("c", (6,), 1),
    optimizer=Adam(lr=0.5),
    groups=(Adam(lr=0.5).hyperparameters(), Adam(lr=0.25).hyperparameters()),
)
STATE_BYTES = 3 * 4 * SIZE


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine()


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(100_000)


@pytest.fixture
def make(engine: WatchedEngine, budget: MemoryBudget, clock: Any) -> Callable[..., Session]:
    """Make a session whose worker is held with token 1."""

    def create(config: SessionConfig = CONFIG) -> Session:
        return make_session(config, engine, budget=budget, clock=clock)

    return create


def request(step: int, **fields: Any) -> StepRequest:
    return StepRequest(step, 0, FLOAT32, FLOAT32, True, 1 << 20, CONFIG.groups)._replace(**fields)


def gradient(seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def apply_step(
    session: Session, wanted: StepRequest, values: Any = None, cuts: Sequence[int] = ()
) -> tuple[StepResult, RecordingWriter]:
    """Apply a step in chunks cut at `cuts`."""
    values = (gradient(wanted.step) if values is None else values).astype(wanted.gradient_dtype)
    writer = RecordingWriter(SIZE, wanted.reply_dtype)
    with stage(session, wanted, values, itertools.pairwise([0, *cuts, SIZE])) as step:
        return session.commit(step, writer), writer


def everything(session: Session) -> tuple[Any, ...]:
    snapshot, slots = pull_everything(session)
    return snapshot, {slot: values.tobytes() for slot, values in slots.items()}


def load(session: Session, number: int, **slots: npt.NDArray[np.float32]) -> bool:
    """Load whole slots."""
    return commit_load(session, LoadRequest(number, tuple(slots)), slots)


def test_a_session_reserves_before_it_allocates(make: Any, engine: WatchedEngine, budget: MemoryBudget) -> None:
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
    make: Any, engine: WatchedEngine, budget: MemoryBudget, broken: str
) -> None:
    engine.break_at(broken)
    with pytest.raises(Failure):
        make()
    assert budget.reserved_bytes == 0


def test_kernels_are_made_when_a_session_is_created_and_not_in_its_steps(make: Any, engine: WatchedEngine) -> None:
    session = make()
    assert engine.calls.count("prepare") >= 1
    engine.calls.clear()
    apply_step(session, request(1))
    apply_step(session, request(2))
    assert "prepare" not in engine.calls


def test_a_step_updates_each_group_with_its_own_numbers_and_answers_padding_with_zeros(make: Any) -> None:
    session = make()
    result, writer = apply_step(session, request(1))
    values, signs = writer.values, np.sign(gradient(1))
    np.testing.assert_allclose(values[:10], -0.5 * signs[:10], rtol=1e-5)
    np.testing.assert_allclose(values[256:], -0.25 * signs[256:], rtol=1e-5)
    assert values[10:256].tolist() == [0.0] * 246
    assert (result.step, result.replayed, [group.t for group in result.groups]) == (1, False, [1, 1])
    assert everything(session)[1]["param"] == values.tobytes()


@pytest.mark.parametrize("cuts", [(), (1,), (10, 256), (5, 100, 258), tuple(range(1, SIZE))])
@pytest.mark.parametrize("most", [1, 3, 100, 1 << 20])
def test_neither_cuts_nor_the_size_of_answers_change_a_bit(make: Any, cuts: Any, most: int) -> None:
    plain, cut = make(), make()
    for step in (1, 2):
        _, expected = apply_step(plain, request(step))
        _, writer = apply_step(cut, request(step, reply_elements=most), cuts=cuts)
        assert writer.values.tobytes() == expected.values.tobytes()
        assert max(end - start for start, end in writer.chunks) <= most
        assert writer.flushed == len(writer.chunks)
        assert [start for start, _ in writer.chunks] == [0, *(end for _, end in writer.chunks[:-1])]
    assert everything(cut) == everything(plain)


def test_a_step_without_an_answer_is_the_same_step(make: Any) -> None:
    plain, silent = make(), make()
    apply_step(plain, request(1))
    _, writer = apply_step(silent, request(1, reply=False))
    assert (writer.chunks, writer.flushed) == ([], 0)
    assert everything(silent) == everything(plain)


def test_a_replay_says_what_was_said_and_changes_nothing(make: Any) -> None:
    session = make()
    result, writer = apply_step(session, request(1))
    before = everything(session)
    for dtype in (FLOAT32, FLOAT16):
        again, replayed = apply_step(session, request(1, reply_dtype=dtype, reply_elements=50), gradient(99))
        assert again == result.replay()
        assert replayed.values.tobytes() == writer.values.astype(dtype).tobytes()
    assert everything(session) == before


def test_a_skipped_step_sends_the_parameters_as_they_are(make: Any) -> None:
    session = make(dataclasses.replace(CONFIG, treatment=GradientTreatment(non_finite="skip")))
    apply_step(session, request(1))
    snapshot, slots = everything(session)
    bad = gradient(2)
    bad[3] = np.nan
    result, writer = apply_step(session, request(2), bad)
    assert (result.skipped, result.non_finite_count, [group.t for group in result.groups]) == (True, 1, [1, 1])
    assert writer.values.tobytes() == slots["param"]
    assert everything(session) == (snapshot._replace(step=2), slots)


def test_a_step_that_is_refused_at_its_commit_has_touched_nothing(make: Any, engine: WatchedEngine) -> None:
    session = make()
    apply_step(session, request(1))
    before = everything(session)
    engine.calls.clear()
    bad = gradient(2)
    bad[258] = np.inf
    with pytest.raises(errors.NonFiniteGradientError, match="'c'"):
        apply_step(session, request(2), bad)
    with (
        begin(session, request(2)) as step,
        pytest.raises(errors.InvalidRequestError, match=r"\[0, 10\) were not sent"),
    ):
        session.commit(step, RecordingWriter(SIZE, FLOAT32))
    assert "update" not in engine.calls
    assert everything(session) == before
    apply_step(session, request(2))


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_commit_that_fails_half_way_damages_the_session_for_ever(
    make: Any, engine: WatchedEngine, budget: MemoryBudget, fails_at: int
) -> None:
    """Some ranges are stepped and some are not: better no answer than that one."""
    session = make()
    apply_step(session, request(1))
    updates = 0

    def trouble(name: str) -> None:
        nonlocal updates
        updates += name == "update"
        if updates == fails_at:
            raise Failure

    engine.trouble = trouble
    with pytest.raises(Failure):
        apply_step(session, request(2), cuts=(5, 10, 256))
    engine.trouble = lambda name: None
    assert budget.reserved_bytes == STATE_BYTES
    for call in (
        lambda: apply_step(session, request(2)),
        lambda: apply_step(session, request(1)),
        lambda: apply_step(session, request(3)),
        session.exchange.snapshot,
        lambda: load(session, 1, param=gradient()),
    ):
        with pytest.raises(errors.DataLossError, match="damaged when step 2 failed half-way"):
            call()
    assert session.ledger.applied_step == 1
    session.close()
    assert budget.reserved_bytes == 0


def test_an_answer_that_cannot_be_held_damages_too(make: Any) -> None:
    session = make()

    class Full(RecordingWriter):
        def buffer(self, offset: int, count: int) -> npt.NDArray[Any]:
            if offset:
                raise MemoryError
            return super().buffer(offset, count)

    wanted = request(1, reply_elements=100)
    with stage(session, wanted, gradient(), [(0, SIZE)]) as step, pytest.raises(MemoryError):
        session.commit(step, Full(SIZE, FLOAT32))
    with pytest.raises(errors.DataLossError):
        session.exchange.snapshot()


def test_a_load_replaces_its_slots_and_leaves_the_others(make: Any, budget: MemoryBudget) -> None:
    session = make()
    apply_step(session, request(1))
    _, before = everything(session)
    assert load(session, 1, exp_avg=gradient(5)) is True
    snapshot, after = everything(session)
    expected = gradient(5)
    expected[10:256] = 0.0  # padding
    assert after == before | {"exp_avg": expected.tobytes()}
    assert (snapshot.step, snapshot.load, snapshot.tensor_steps) == (1, 1, (1, 1, 1))
    assert load(session, 1, exp_avg=gradient(6)) is False
    assert everything(session) == (snapshot, after)
    assert budget.reserved_bytes == STATE_BYTES


def test_a_load_that_fails_half_way_damages_the_session(make: Any, engine: WatchedEngine) -> None:
    session = make()
    engine.break_at("adopt")
    with pytest.raises(Failure):
        load(session, 1, param=gradient())
    with pytest.raises(errors.DataLossError, match="damaged when load 1 failed half-way"):
        session.exchange.snapshot()


def test_a_load_that_cannot_be_staged_gives_its_memory_back(
    make: Any, engine: WatchedEngine, budget: MemoryBudget
) -> None:
    session = make()
    engine.break_at("allocate")
    with pytest.raises(Failure):
        load(session, 1, param=gradient())
    assert (budget.reserved_bytes, session.statistics().loads) == (STATE_BYTES, 0)


def test_a_pull_is_of_one_moment(make: Any) -> None:
    session = make()
    for change in (lambda: apply_step(session, request(1)), lambda: load(session, 1, param=gradient())):
        snapshot = session.exchange.snapshot()
        change()
        with pytest.raises(errors.StateChangedError, match="pull again"):
            session.exchange.read(snapshot, "param", 0, np.empty(SIZE, np.float32))


def test_a_gradient_is_reserved_for_at_its_begin_and_given_back_at_its_end(make: Any, budget: MemoryBudget) -> None:
    session = make()
    for dtype, reply, nbytes in (
        (FLOAT32, FLOAT32, 4 * SIZE),
        (FLOAT16, FLOAT16, 2 * SIZE),
        (FLOAT16, FLOAT32, 4 * SIZE),
        (INT8, FLOAT32, 4 * SIZE),
        (INT8, FLOAT16, 2 * SIZE),
    ):
        with begin(session, request(1, gradient_dtype=dtype, reply_dtype=reply)):
            assert budget.reserved_bytes == STATE_BYTES + nbytes
        assert budget.reserved_bytes == STATE_BYTES


def test_closing_waits_for_the_commit_under_way(make: Any, engine: WatchedEngine, budget: MemoryBudget) -> None:
    session = make()
    inside, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def trouble(name: str) -> None:
        if name == "update":
            inside.set()
            assert go_on.wait(PATIENCE_SECONDS)

    engine.trouble = trouble
    stepping = threading.Thread(target=lambda: results.append(apply_step(session, request(1))[0]))
    closing = threading.Thread(target=session.close)
    stepping.start()
    assert inside.wait(PATIENCE_SECONDS)
    closing.start()
    assert closing.is_alive()
    go_on.set()
    for thread in (stepping, closing):
        thread.join(PATIENCE_SECONDS)
    assert [result.step for result in results] == [1]
    assert (session.ledger.closed, budget.reserved_bytes) == (True, 0)


def test_a_step_that_began_before_the_end_is_not_found_at_its_commit(make: Any, budget: MemoryBudget) -> None:
    session = make()
    with begin(session, request(1)) as step:
        session.close()
        bring(step, gradient(), [(0, SIZE)])
        with pytest.raises(errors.SessionNotFoundError):
            session.commit(step, RecordingWriter(SIZE, FLOAT32))
    assert budget.reserved_bytes == 0


def test_times_are_told_by_the_sessions_clock(make: Any, engine: WatchedEngine, clock: Any) -> None:
    session = make()

    def trouble(name: str) -> None:
        clock.now += 2.0 if name == "update" else 0.0

    engine.trouble = trouble
    with session.begin(request(1), holder_of(session), clock.now) as step:
        clock.now += 5.0
        bring(step, gradient(), [(0, SIZE)])
        step.received = clock.now
        clock.now += 1.0
        result = session.commit(step, RecordingWriter(SIZE, FLOAT32))
    assert result.times == StepTimes(receive=5.0, queue=1.0, apply=4.0)


def test_the_norm_is_that_of_the_whole_gradient(make: Any) -> None:
    result, _ = apply_step(make(), request(1))
    values = gradient(1).astype(np.float64)
    squares = [float((values[start:end] ** 2).sum()) for start, end in ((0, 10), (256, SIZE))]
    assert [group.grad_norm for group in result.groups] == [float(np.float32(np.sqrt(square))) for square in squares]
    assert result.grad_norm == float(np.float32(np.sqrt(sum(squares))))
