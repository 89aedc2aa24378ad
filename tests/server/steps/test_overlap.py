"""Steps that are applied as they arrive: the bits of whole steps, in as many attempts as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError, Reason, SessionNotReadyError, StateChangedError
from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from stepwire_server.config import ServerConfig
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.sessions.session import Session
from stepwire_server.steps.overlap import Marks
from stepwire_server.steps.reply import ReplyPipeline
from tests.server.session_driver import Sink, request_of

ALLOW = optimizer_pb2.NON_FINITE_POLICY_ALLOW
SHAPES = {"w": (300, 7), "b": (130,), "frozen": (40,), "scale": ()}


@pytest.fixture(scope="module")
def engine() -> Iterator[CpuEngine]:
    engine = CpuEngine(threads=1)
    yield engine
    engine.close()


def plan(**fields: Any) -> Any:
    tensors = [
        tensor_pb2.TensorSpec(name=name, shape=shape, group=int(name != "w"), frozen=name == "frozen")
        for name, shape in SHAPES.items()
    ]
    adam = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM)
    config = session_pb2.SessionConfig(
        tensors=tensors,
        optimizer=adam,
        groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()],
        gradient=optimizer_pb2.GradientTreatment(non_finite=ALLOW),
        initialization=session_pb2.INITIALIZATION_ZEROS,
        **fields,
    )
    return decode_session_config(config, ServerConfig())


@pytest.fixture
def make(engine: CpuEngine) -> Any:
    made: list[Session] = []

    def create(**fields: Any) -> Session:
        session = Session("ab" * 16, plan(**fields), engine, MemoryBudget(1 << 24), epoch=1, clock=lambda: 0.0)
        session.take_slot()
        made.append(session)
        return session

    yield create
    for session in made:
        session.close()


def gradient(session: Session, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(session.plan.layout.size).astype(np.float32)


def spans(session: Session, cuts: Any) -> list[tuple[int, int]]:
    edges = sorted({0, session.plan.layout.size, *(cut % session.plan.layout.size for cut in cuts)})
    return list(zip(edges, edges[1:], strict=False))


def attempt(session: Session, values: Any, chunks: Any, *, finish: bool = True, **fields: Any) -> tuple[Any, Any]:
    """Send chunks of an overlapped step, and perhaps its commit; return the record and the answer."""
    request = request_of(session, overlap=True, **fields)
    sink = Sink(session.plan.layout.size, request.reply_dtype)
    staging = session.begin(request, 1)
    try:
        with ReplyPipeline(sink, session.depth) as answer:
            for start, end in chunks:
                payload = np.frombuffer(values[start:end].tobytes(), np.uint8)
                staging.add(start, end - start, payload)
                session.apply(request, staging.take(), 1, sink, answer)
        return (session.finish(request, staging, 1, 0.0) if finish else None), sink.values
    finally:
        staging.close()


def whole(session: Session, values: Any) -> tuple[Any, Any]:
    """Take the same step at once."""
    request = request_of(session)
    sink = Sink(session.plan.layout.size, request.reply_dtype)
    staging = session.begin(request, 1)
    try:
        staging.add(0, len(values), np.frombuffer(values.tobytes(), np.uint8))
        return session.commit(request, staging, 1, sink, 0.0), sink.values
    finally:
        staging.close()


def state(session: Session) -> dict[str, bytes]:
    found = {}
    for slot in session.slots:
        values = np.empty(session.plan.layout.size, np.float32)
        session.read(session.snapshot(), slot, 0, values)
        found[slot] = values.tobytes()
    return found


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=12), st.integers(0, 60), st.integers(0, 60))
def test_marks_are_a_set_of_elements(added: list[tuple[int, int]], low: int, high: int) -> None:
    marks, marked = Marks(), set[int]()
    for start, count in added:
        marks.add(start, start + count)
        marked |= set(range(start, start + count))
    start, end = min(low, high), max(low, high) + 1
    parts = marks.without(start, end)
    assert [i for a, b in parts for i in range(a, b)] == [i for i in range(start, end) if i not in marked]
    assert all(a < b for a, b in parts)


@pytest.mark.parametrize("precision", [1, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reply", [1, 2], ids=["to_float32", "to_bfloat16"])
def test_chunks_in_any_order_give_the_bits_of_a_whole_step(make: Any, precision: int, reply: int) -> None:
    rng = np.random.default_rng(5)
    one, other = (make(state_precision=precision, reply_dtype=reply) for _ in range(2))
    for step in range(1, 5):
        values = gradient(one, step)
        chunks = spans(one, rng.integers(0, 9999, 7).tolist())
        rng.shuffle(chunks)
        record, answer = attempt(one, values, chunks, reply_elements=100)
        expected, parameters = whole(other, values)
        assert answer.tobytes() == parameters.tobytes()
        assert (record.step, record.grad_norm, [group.t for group in record.groups]) == (
            expected.step,
            expected.grad_norm,
            [group.t for group in expected.groups],
        )
        assert record.update_norm == pytest.approx(expected.update_norm, rel=1e-6)
        assert state(one) == state(other)


@pytest.mark.parametrize("first", [(0,), (0, 2), (3, 1), (2, 0, 1)])
def test_a_broken_step_is_finished_and_nothing_is_applied_twice(make: Any, first: tuple[int, ...]) -> None:
    one, other = make(), make()
    for session in (one, other):
        whole(session, gradient(session, 9))
    values, expected = gradient(one, 2), whole(other, gradient(other, 2))
    chunks = spans(one, [700, 1300, 2100])
    attempt(one, values, [chunks[index] for index in first], finish=False)
    assert (one.unfinished_step, one.ledger.applied_step) == (2, 1)
    record, answer = attempt(one, values, spans(one, [100, 1000, 2222]))
    assert (one.unfinished_step, record.step, record.grad_norm) == (0, 2, expected[0].grad_norm)
    assert answer.tobytes() == expected[1].tobytes()
    assert record.update_norm == pytest.approx(expected[0].update_norm, rel=1e-6)
    assert state(one) == state(other)


def test_a_step_without_all_its_chunks_stays_unfinished(make: Any) -> None:
    session = make()
    values, chunks = gradient(session), spans(session, [1000])
    with pytest.raises(InvalidRequestError, match=r"elements \[1000, \d+\) were not sent"):
        attempt(session, values, chunks[:1])
    assert session.unfinished_step == 1
    record, _ = attempt(session, values, chunks)
    assert (record.step, session.unfinished_step) == (1, 0)


def test_a_step_of_which_nothing_came_leaves_no_trace(make: Any) -> None:
    session = make()
    values = gradient(session)
    with pytest.raises(InvalidRequestError, match="were not sent"):
        attempt(session, values, [])
    assert session.unfinished_step == 0
    assert whole(session, values)[0].step == 1


@pytest.fixture
def half(make: Any) -> Session:
    """A session with a step that was broken off."""
    session = make()
    attempt(session, gradient(session), spans(session, [1000])[:1], finish=False)
    return session


def test_only_the_same_step_goes_on(half: Session) -> None:
    values, before = gradient(half), half.plan.groups
    hotter = tuple(group.replace({"lr": 0.5}) for group in before)
    with pytest.raises(SessionNotReadyError, match="step 1 was broken off half applied: take it again, with `overlap`"):
        attempt(half, values, spans(half, []), groups=hotter)
    with pytest.raises(SessionNotReadyError) as refused:
        whole(half, values)
    assert (refused.value.reason, refused.value.metadata) == (Reason.STEP_UNFINISHED, {"unfinished_step": "1"})
    assert attempt(half, values, spans(half, []))[0].step == 1


def test_half_a_step_is_not_read(half: Session) -> None:
    with pytest.raises(StateChangedError, match="step 1 is half applied; pull when it is finished"):
        half.snapshot()
    attempt(half, gradient(half), spans(half, []))
    assert half.snapshot().step == 1


def test_a_pull_that_a_step_begins_under_is_told(make: Any) -> None:
    session = make()
    snapshot = session.snapshot()
    attempt(session, gradient(session), spans(session, [1000])[:1], finish=False)
    with pytest.raises(StateChangedError):
        session.read(snapshot, "param", 0, np.empty(10, np.float32))


def test_a_load_of_everything_replaces_half_a_step_and_one_of_a_part_does_not(half: Session) -> None:
    size, slots = half.plan.layout.size, half.slots
    staged, room = half.stage_load(("param",))
    with room, pytest.raises(SessionNotReadyError):
        half.commit_load(staged, ("param",), 1, 1, None, [])
    staged, room = half.stage_load(slots)
    for slot in slots:
        staged.write(slot, 0, np.full(size, 0.5, np.float32))
    with room:
        assert half.commit_load(staged, slots, 1, 1, 4, [4] * len(SHAPES)) is True
    assert (half.unfinished_step, half.snapshot().step) == (0, 4)
    assert set(state(half).values()) == {np.full(size, 0.5, np.float32).tobytes()}


def test_a_step_that_moves_nothing_is_finished_without_a_chunk(make: Any) -> None:
    session = make()
    empty = frozenset(range(len(SHAPES)))
    record, _ = attempt(session, gradient(session), [], missing=empty)
    assert (record.step, record.grad_norm) == (1, 0.0)


def test_nan_is_counted_and_applied(make: Any) -> None:
    session = make()
    values = gradient(session)
    values[5] = np.nan
    record, answer = attempt(session, values, spans(session, [1000]))
    assert (record.non_finite_count, record.skipped) == (1, False)
    assert np.flatnonzero(np.isnan(answer)).tolist() == [5]
