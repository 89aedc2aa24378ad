"""Each commit is told once, in order; replays and refused steps are not, and a sink that fails harms nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import structlog.testing

from stepwire import errors
from stepwire.layout import TensorSpec
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines import CpuEngine
from stepwire_server.records.committed import Committed
from stepwire_server.records.session_statistics import SessionStatistics
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.session import Session
from stepwire_server.steps.reply import ReplyPipeline
from tests.server.configs import make_config
from tests.server.session_driver import (
    Array,
    RecordingWriter,
    apply_step,
    bring,
    everything,
    holder_of,
    load,
    make_session,
    request_of,
)

SIZE = 10
ALLOWING = {"non_finite": "allow"}


@pytest.fixture
def told() -> list[Committed]:
    return []


@pytest.fixture
def make(told: list[Committed]) -> Callable[..., Session]:
    def create(*sinks: Any, **treatment: Any) -> Session:
        config = make_config(TensorSpec("w", (SIZE,)), treatment=GradientTreatment(**treatment))
        engine = CpuEngine(threads=1, use_numba=False)
        return make_session(config, engine, sinks=sinks or (told.append,))

    return create


def gradient(seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def poisoned() -> Array:
    values = gradient()
    values[3] = np.nan
    return values


def overlapped(session: Session, values: Array) -> Any:
    """Apply the next step as it arrives."""
    with session.begin(request_of(session, overlap=True), holder_of(session), 0.0) as step:
        with ReplyPipeline(RecordingWriter(SIZE, FLOAT32), session.depth) as reply:
            bring(step, values, [(0, SIZE)])
            chunk = step.gradient.pop()
            assert chunk is not None
            session.apply(step, chunk, reply)
        return session.finish(step)


def test_each_commit_is_told_once_in_order(make: Any, told: list[Committed]) -> None:
    session = make(non_finite="skip", accumulation_steps=2)
    results = [apply_step(session, values)[0] for values in (gradient(1), gradient(2), poisoned(), gradient(4))]
    assert [committed.result for committed in told] == results
    assert [committed.request.step for committed in told] == [1, 2, 3, 4]
    assert {committed[:3] for committed in told} == {(session.session_id, 0, 0)}
    assert [(result.accumulated, result.skipped) for result in results] == [
        (True, False),
        (False, False),
        (True, False),
        (False, True),
    ]


def test_a_commit_is_told_with_the_load_that_it_was_applied_to(make: Any, told: list[Committed]) -> None:
    session = make()
    apply_step(session, gradient())
    for number in (1, 2):
        assert load(session, {"param": gradient(9)})
        apply_step(session, gradient(number))
    assert [(committed.load, committed.result.step) for committed in told] == [(0, 1), (1, 2), (2, 3)]


def test_a_step_that_was_applied_as_it_arrived_is_told_when_it_is_whole(make: Any, told: list[Committed]) -> None:
    session = make(**ALLOWING)
    with contextlib.suppress(errors.InvalidRequestError):
        with session.begin(request_of(session, overlap=True), holder_of(session), 0.0) as step:
            bring(step, gradient(), [(0, 5)])
            with ReplyPipeline(RecordingWriter(SIZE, FLOAT32), session.depth) as reply:
                session.apply(step, step.gradient.pop(), reply)
            session.finish(step)
    assert (told, session.unfinished_step) == ([], 1)
    result = overlapped(session, gradient())
    assert [committed.result for committed in told] == [result]


def test_replays_and_refused_steps_are_not_told(make: Any, told: list[Committed]) -> None:
    session = make()
    apply_step(session, gradient())
    again, _ = apply_step(session, gradient(), step=1)
    assert again.replayed
    for call in (
        lambda: apply_step(session, poisoned()),
        lambda: apply_step(session, gradient(), [(0, 5)]),
        lambda: apply_step(session, gradient(), step=5),
        lambda: apply_step(session, gradient(), load=3),
    ):
        with pytest.raises(errors.StepwireError):
            call()
    assert [committed.result.step for committed in told] == [1]


def test_all_sinks_are_told_in_their_order(make: Any) -> None:
    order: list[str] = []
    session = make(lambda committed: order.append("first"), lambda committed: order.append("second"))
    apply_step(session, gradient())
    apply_step(session, gradient())
    assert order == ["first", "second"] * 2


@pytest.mark.parametrize("overlap", [False, True], ids=["whole", "overlapped"])
def test_a_sink_that_fails_changes_nothing(make: Any, told: list[Committed], overlap: bool) -> None:
    def broken(committed: Committed) -> None:
        raise RuntimeError("disk full")

    plain, failing = make(**ALLOWING), make(broken, told.append, **ALLOWING)
    told.clear()
    for step in (1, 2):
        for session in (plain, failing):
            with structlog.testing.capture_logs() as logged:
                result = overlapped(session, gradient(step)) if overlap else apply_step(session, gradient(step))[0]
            assert (result.step, result.replayed) == (step, False)
        assert [(line["event"], line["step"]) for line in logged] == [("sink failed", step)]
    assert [committed.result.step for committed in told] == [1, 1, 2, 2], "the sink behind it is told"
    assert everything(failing)[0] == everything(plain)[0]
    for slot, values in everything(plain)[1].items():
        assert everything(failing)[1][slot].tobytes() == values.tobytes()
    assert apply_step(failing, gradient(2), step=2)[0].replayed


# --- numbers for whoever watches ----------------------------------------------------------------------------------


def test_statistics_are_those_of_the_moment(make: Any) -> None:
    session = make(**ALLOWING)
    nbytes = 3 * 4 * SIZE
    assert session.statistics() == SessionStatistics(0, 0, 0, nbytes, attached=False, loads=0)
    apply_step(session, gradient())
    assert load(session, {"param": gradient()})
    before = session.statistics()
    assert before == SessionStatistics(1, 1, 0, nbytes, attached=False, loads=0)
    with session.attached(ClientStream(lambda: None, 0.0), holder_of(session).token, 0) as holder:
        assert session.statistics() == before._replace(attached=True)
        with session.begin(request_of(session, overlap=True), holder, 0.0) as step:
            bring(step, gradient(), [(0, 5)])
            with ReplyPipeline(RecordingWriter(SIZE, FLOAT32), session.depth) as reply:
                session.apply(step, step.gradient.pop(), reply)
        assert session.statistics() == before._replace(attached=True, unfinished_step=2)
    assert session.statistics() == before._replace(unfinished_step=2)


def test_a_commit_that_is_made_again_is_not_told(make: Callable[..., Session], told: list[Committed]) -> None:
    session = make()
    load(session, {"param": gradient(0)})
    with session.untold():
        apply_step(session, gradient(1))
    assert told == []
    apply_step(session, gradient(2))
    assert [each.result.step for each in told] == [2]
