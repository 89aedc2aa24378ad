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
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.sessions.session import Session
from stepwire_server.steps.overlap import Marks
from stepwire_server.steps.reply import ReplyPipeline
from tests.server.session_driver import (
    RecordingWriter,
    apply_step,
    begin,
    bring,
    commit_load,
    everything,
    make_session,
    request_of,
)

ALLOW = optimizer_pb2.NON_FINITE_POLICY_ALLOW
SHAPES = {"w": (300, 7), "b": (130,), "frozen": (40,), "scale": ()}


@pytest.fixture(scope="module")
def engine() -> Iterator[CpuEngine]:
    engine = CpuEngine(threads=1)
    yield engine
    engine.close()


def decoded_config(**fields: Any) -> Any:
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
        session = make_session(decoded_config(**fields), engine, 1 << 24)
        made.append(session)
        return session

    yield create
    for session in made:
        session.close()


def gradient(session: Session, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(session.config.layout.size).astype(np.float32)


def ranges(session: Session, cuts: Any) -> list[tuple[int, int]]:
    edges = sorted({0, session.config.layout.size, *(cut % session.config.layout.size for cut in cuts)})
    return list(zip(edges, edges[1:], strict=False))


def attempt(session: Session, values: Any, chunks: Any, *, finish: bool = True, **fields: Any) -> tuple[Any, Any]:
    """Send chunks of an overlapped step, and perhaps its commit; return the result and the reply."""
    request = request_of(session, overlap=True, **fields)
    writer = RecordingWriter(session.config.layout.size, request.reply_dtype)
    with begin(session, request) as step:
        with ReplyPipeline(writer, session.depth) as reply:
            for chunk in chunks:
                bring(step, values, [chunk])
                session.apply(step, step.gradient.pop(), reply)
        return (session.finish(step) if finish else None), writer.values


def state(session: Session) -> dict[str, bytes]:
    return {slot: values.tobytes() for slot, values in everything(session)[1].items()}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=12), st.integers(0, 60), st.integers(0, 60))
def test_marks_are_a_set_of_elements(added: list[tuple[int, int]], low: int, high: int) -> None:
    marks, marked = Marks(), set[int]()
    for start, count in added:
        marks.add(start, start + count)
        marked |= set(range(start, start + count))
    start, end = min(low, high), max(low, high) + 1
    unmarked = marks.without(start, end)
    assert [i for a, b in unmarked for i in range(a, b)] == [i for i in range(start, end) if i not in marked]
    assert all(a < b for a, b in unmarked)


@pytest.mark.parametrize("precision", [1, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reply", [1, 2], ids=["to_float32", "to_bfloat16"])
def test_chunks_in_any_order_give_the_bits_of_a_whole_step(make: Any, precision: int, reply: int) -> None:
    rng = np.random.default_rng(5)
    one, other = (make(state_precision=precision, reply_dtype=reply) for _ in range(2))
    for step in range(1, 5):
        values = gradient(one, step)
        chunks = ranges(one, rng.integers(0, 9999, 7).tolist())
        rng.shuffle(chunks)
        result, reply = attempt(one, values, chunks, reply_elements=100)
        expected, parameters = apply_step(other, values)
        assert reply.tobytes() == parameters.tobytes()
        assert (result.step, result.grad_norm, [group.t for group in result.groups]) == (
            expected.step,
            expected.grad_norm,
            [group.t for group in expected.groups],
        )
        assert result.update_norm == pytest.approx(expected.update_norm, rel=1e-5)
        assert state(one) == state(other)


@pytest.mark.parametrize("first", [(0,), (0, 2), (3, 1), (2, 0, 1)])
def test_a_broken_step_is_finished_and_nothing_is_applied_twice(make: Any, first: tuple[int, ...]) -> None:
    one, other = make(), make()
    for session in (one, other):
        apply_step(session, gradient(session, 9))
    values, expected = gradient(one, 2), apply_step(other, gradient(other, 2))
    chunks = ranges(one, [700, 1300, 2100])
    attempt(one, values, [chunks[index] for index in first], finish=False)
    assert (one.unfinished_step, one.ledger.applied_step) == (2, 1)
    result, reply = attempt(one, values, ranges(one, [100, 1000, 2222]))
    assert (one.unfinished_step, result.step, result.grad_norm) == (0, 2, expected[0].grad_norm)
    assert reply.tobytes() == expected[1].tobytes()
    assert result.update_norm == pytest.approx(expected[0].update_norm, rel=1e-5)
    assert state(one) == state(other)


def test_a_step_without_all_its_chunks_stays_unfinished(make: Any) -> None:
    session = make()
    values, chunks = gradient(session), ranges(session, [1000])
    with pytest.raises(InvalidRequestError, match=r"elements \[1000, \d+\) were not sent"):
        attempt(session, values, chunks[:1])
    assert session.unfinished_step == 1
    result, _ = attempt(session, values, chunks)
    assert (result.step, session.unfinished_step) == (1, 0)


def test_a_step_of_which_nothing_came_leaves_no_trace(make: Any) -> None:
    session = make()
    values = gradient(session)
    with pytest.raises(InvalidRequestError, match="were not sent"):
        attempt(session, values, [])
    assert session.unfinished_step == 0
    assert apply_step(session, values)[0].step == 1


@pytest.fixture
def half(make: Any) -> Session:
    """A session with a step that was broken off."""
    session = make()
    attempt(session, gradient(session), ranges(session, [1000])[:1], finish=False)
    return session


def test_only_the_same_step_goes_on(half: Session) -> None:
    values, before = gradient(half), half.config.groups
    hotter = tuple(group.replace({"lr": 0.5}) for group in before)
    with pytest.raises(SessionNotReadyError, match="step 1 was broken off half applied: send it again, with `overlap`"):
        attempt(half, values, ranges(half, []), groups=hotter)
    with pytest.raises(SessionNotReadyError) as refused:
        apply_step(half, values)
    assert (refused.value.reason, refused.value.metadata) == (Reason.STEP_UNFINISHED, {"unfinished_step": "1"})
    assert attempt(half, values, ranges(half, []))[0].step == 1


def test_half_a_step_is_not_read(half: Session) -> None:
    with pytest.raises(StateChangedError, match="step 1 is half applied; pull when it is finished"):
        half.exchange.snapshot()
    attempt(half, gradient(half), ranges(half, []))
    assert half.exchange.snapshot().step == 1


def test_a_pull_that_a_step_begins_under_is_told(make: Any) -> None:
    session = make()
    snapshot = session.exchange.snapshot()
    attempt(session, gradient(session), ranges(session, [1000])[:1], finish=False)
    with pytest.raises(StateChangedError):
        session.exchange.read(snapshot, "param", 0, np.empty(10, np.float32))


def test_a_load_of_everything_replaces_half_a_step_and_one_of_a_part_does_not(half: Session) -> None:
    values = np.full(half.config.layout.size, 0.5, np.float32)
    with pytest.raises(SessionNotReadyError):
        commit_load(half, LoadRequest(1, ("param",)), {"param": values})
    whole = LoadRequest(1, half.slots, step=4, tensor_steps=(4,) * len(SHAPES))
    with pytest.raises(SessionNotReadyError):
        commit_load(half, whole._replace(step=None), dict.fromkeys(half.slots, values))
    assert half.unfinished_step == 1
    assert commit_load(half, whole, dict.fromkeys(half.slots, values)) is True
    assert (half.unfinished_step, half.exchange.snapshot().step) == (0, 4)
    expected = np.zeros_like(values)  # padding stays zero
    for tensor in half.config.layout.tensors:
        expected[tensor.offset : tensor.end] = 0.5
    assert set(state(half).values()) == {expected.tobytes()}


def test_the_step_before_half_a_step_is_not_replayed(make: Any) -> None:
    """Its parameters are gone, and those of no step must not go back in their place."""
    session = make()
    values = gradient(session)
    apply_step(session, values)
    attempt(session, values, ranges(session, [1000])[:1], finish=False)
    with pytest.raises(SessionNotReadyError, match="step 2 was broken off half applied: finish it"):
        apply_step(session, values, step=1)
    assert attempt(session, values, ranges(session, []))[0].step == 2


def test_a_step_under_which_a_load_came_is_not_finished(make: Any) -> None:
    """Its first chunks were applied to the state before the load, and never to the loaded one."""
    session = make()
    values, loaded = gradient(session), np.full(session.config.layout.size, 0.5, np.float32)
    first, second = ranges(session, [1000])
    writer = RecordingWriter(session.config.layout.size, session.config.reply_dtype)
    with begin(session, request_of(session, overlap=True)) as step, ReplyPipeline(writer, session.depth) as reply:
        bring(step, values, [first])
        session.apply(step, step.gradient.pop(), reply)
        commit_load(session, LoadRequest(1, session.slots, step=0), dict.fromkeys(session.slots, loaded))
        bring(step, values, [second])
        with pytest.raises(StateChangedError, match="the state was replaced while the step arrived"):
            session.finish(step)
    assert session.ledger.applied_step == 0


def test_a_step_that_moves_nothing_is_finished_without_a_chunk(make: Any) -> None:
    session = make()
    empty = frozenset(range(len(SHAPES)))
    result, _ = attempt(session, gradient(session), [], missing=empty)
    assert (result.step, result.grad_norm) == (1, 0.0)


def test_nan_is_counted_and_applied(make: Any) -> None:
    session = make()
    values = gradient(session)
    values[5] = np.nan
    result, reply = attempt(session, values, ranges(session, [1000]))
    assert (result.non_finite_count, result.skipped) == (1, False)
    assert np.flatnonzero(np.isnan(reply)).tolist() == [5]
