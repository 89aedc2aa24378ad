"""The link to a sharded session: steps that some shards applied and others did not."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.channel import Calls
from stepwire.connection.errands import adopt_thread
from stepwire.errors import DeadlineExceededError, Reason, StepMismatchError, StepwireError, UnavailableError
from stepwire.links.hold import Hold
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.sessions.session import Session as ServerSession
from tests.support.lost_replies import lost_replies

SIZE = 140_000
START = {"w": np.zeros(SIZE, np.float32)}
ONES, TWOS = {"w": np.ones(SIZE, np.float32)}, {"w": np.full(SIZE, 2.0, np.float32)}
OPTIONS: dict[str, dict[str, Any]] = {
    "one_phase": {"non_finite": "allow"},
    "two_phases": {"clip_grad_norm": 1e9},
}
Create = Callable[[], stepwire.Session]


@pytest.fixture(params=OPTIONS)
def create(target: str, request: pytest.FixtureRequest) -> Iterator[Create]:
    """Make sessions of two shards, of SGD with rate 1: the parameters are minus the sum of the gradients."""
    with stepwire.connect(target, channels=2, timeout=120.0) as client:
        made = []

        def created() -> stepwire.Session:
            made.append(client.create_session(START, optimizer=stepwire.SGD(lr=1.0), **OPTIONS[request.param]))
            assert len(made[-1].shards) == 2
            return made[-1]

        yield created
        for session in made:
            session.close()


def shard_of(session: stepwire.Session, rank: int) -> Callable[[Hold], bool]:
    hold = session.shards[rank]._link.hold  # type: ignore[attr-defined]
    return lambda other: other is hold


def fail(session: stepwire.Session, gradient: Any, *, on: int | None = None, applied: bool) -> None:
    """Take a step whose outcome stays unknown on one shard, or on all."""
    which = (lambda hold: True) if on is None else shard_of(session, on)
    with lost_replies(applied=applied, of=which), pytest.raises(DeadlineExceededError):
        session.step(gradient)
    assert session.statistics().step_in_doubt is not None


def half_apply(session: stepwire.Session, gradient: Any) -> None:
    """Have one shard apply a step, and the other one never get its end."""
    exchange, second = Hold._exchange, shard_of(session, 1)

    def broken(self: Hold, stream: Any, call: Any, deadline: Any) -> Any:
        if not second(self):
            return exchange(self, stream, call, deadline)
        if call.decide is None:
            raise DeadlineExceededError("the connection broke")
        decide = call.decide

        def decide_and_break(check: Any) -> Any:
            decide(check)
            raise DeadlineExceededError("the connection broke after the decision")

        call.decide = decide_and_break
        try:
            return exchange(self, stream, call, deadline)
        finally:
            call.decide = decide

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Hold, "_exchange", broken)
        with pytest.raises(DeadlineExceededError):
            session.step(gradient)
    assert counts(session)[0] == counts(session)[1] + 1


def counts(session: stepwire.Session) -> list[int]:
    return [shard.info().applied_step for shard in session.shards]


def values(parameters: Any) -> set[float]:
    return set(parameters["w"].tolist())


def test_the_same_gradient_finishes_a_half_applied_step(create: Create) -> None:
    session = create()
    session.step(ONES)
    half_apply(session, TWOS)
    assert (session.applied_step, session.statistics().reply_begun) == (1, True)
    assert values(session.step({"w": TWOS["w"].copy()})) == {-3.0}
    assert counts(session) == [2, 2]
    assert (session.applied_step, session.statistics().step_in_doubt) == (2, None)
    assert values(session.step(ONES)) == {-4.0}


def test_another_gradient_is_refused_while_a_step_is_half_applied(create: Create) -> None:
    """Neither half of the model takes a step of it; the remedy is named, and works."""
    session = create()
    half_apply(session, ONES)
    for _ in range(2):
        with pytest.raises(StepMismatchError, match="same gradients.*load_state") as refused:
            session.step(TWOS)
        assert refused.value.metadata == {"steps": "1,0", "expected_step": "1", "actual_step": "1"}
        assert counts(session) == [1, 0]
    assert values(session.step(ONES)) == {-1.0}
    assert counts(session) == [1, 1]


def never_repeat(session: stepwire.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a call waits for another attempt."""
    retry = stepwire.Retry(sleep=lambda seconds: pytest.fail("a call was repeated"))
    monkeypatch.setattr(session.shards[0]._link._route.calls, "retry", retry)  # type: ignore[attr-defined]


def test_a_half_applied_step_is_told_by_a_pull_at_once(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other client can level the shards, so they are not read again and again until the timeout."""
    session = create()
    half_apply(session, ONES)
    never_repeat(session, monkeypatch)
    for read in (session.pull, session.state):
        with pytest.raises(StepMismatchError, match="step 1 failed and was applied on some.*same gradients") as told:
            read()
        assert told.value.metadata == {"steps": "1,0", "expected_step": "1", "actual_step": "1"}
    session.step(ONES)
    assert values(session.pull()) == {-1.0}


def test_a_client_that_attached_to_uneven_shards_is_told_by_a_pull_at_once(
    target: str, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that only reads repeats the pull instead: the holder of the session may be stepping."""
    session = create()
    half_apply(session, ONES)
    session.detach()
    now = [0.0]  # a clock that the waits between repetitions move, and nothing else
    retry = stepwire.Retry(clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    with stepwire.connect(target, channels=2, timeout=120.0, retry=retry) as client:
        found = client.session(session.session_id)
        with pytest.raises(StepMismatchError, match=r"were read \d+ times and were at different steps"):
            found.pull()
        assert now[0] > 10.0
        found.attach()
        never_repeat(found, monkeypatch)
        with pytest.raises(StepMismatchError, match="their client ended between two of them"):
            found.pull()


def test_a_pull_beside_a_step_waits_for_the_step(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that finishes a half applied step is under way, so the shards are read again after it."""
    session = create()
    half_apply(session, ONES)
    lock = session._link.lock
    locked, released = threading.Event(), threading.Event()

    def hold() -> None:
        adopt_thread()  # so that it is the step's thread too
        with lock:
            locked.set()
            assert released.wait(120.0)
            session.step(ONES)
            done.set()

    done = threading.Event()
    stepping = threading.Thread(target=hold)
    stepping.start()
    assert locked.wait(120.0)

    def release(seconds: float) -> None:
        released.set()
        assert done.wait(120.0)

    retry = stepwire.Retry(sleep=release)
    monkeypatch.setattr(session.shards[0]._link._route.calls, "retry", retry)  # type: ignore[attr-defined]
    assert values(session.pull()) == {-1.0}
    stepping.join()


def test_a_loaded_state_replaces_a_half_applied_step(create: Create) -> None:
    session = create()
    before = session.state()
    half_apply(session, ONES)
    session.load_state(dataclasses.replace(before, step=1))
    assert (session.applied_step, session.statistics().step_in_doubt) == (1, None)
    assert values(session.step(ONES)) == {-1.0}
    assert counts(session) == [2, 2]


def test_loaded_parameters_level_the_shards(create: Create) -> None:
    session = create()
    half_apply(session, ONES)
    session.load({"w": np.full(SIZE, 10.0, np.float32)})
    assert (session.applied_step, counts(session)) == (1, [1, 1])
    assert values(session.step(TWOS)) == {8.0}
    assert counts(session) == [2, 2]


@pytest.mark.parametrize(("applied", "step", "value"), [(True, 2, -3.0), (False, 1, -2.0)])
def test_another_gradient_follows_on_a_step_that_all_shards_applied_or_none(
    create: Create, applied: bool, step: int, value: float
) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    assert values(session.step(TWOS)) == {value}
    assert counts(session) == [step, step]
    assert session.last_result is not None and not session.last_result.replayed


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_is_applied_once_by_all(create: Create, applied: bool) -> None:
    session = create()
    for _ in range(2):
        fail(session, ONES, applied=applied)
    assert values(session.step(ONES)) == {-1.0}
    assert counts(session) == [1, 1]


def test_a_lost_reply_of_one_shard_leaves_the_step_applied_by_all(create: Create) -> None:
    session = create()
    fail(session, ONES, on=1, applied=True)
    assert counts(session) == [1, 1]
    assert values(session.step(TWOS)) == {-3.0}
    assert counts(session) == [2, 2]


def test_attaching_tells_the_outcome_and_forgets_nothing(create: Create) -> None:
    session = create()
    fail(session, ONES, applied=True)
    session.attach()
    assert session.applied_step == 1
    assert values(session.step(ONES)) == {-1.0}
    half_apply(session, ONES)
    session.attach()
    assert session.applied_step == 1
    session.attach(take_over=True)  # nobody held the workers in between
    assert values(session.step(ONES)) == {-2.0}
    assert counts(session) == [2, 2]


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_after_another_client_stepped_is_refused(
    create: Create, client: stepwire.Client, target: str, applied: bool
) -> None:
    """The number of the step in doubt is of either client by now: its repetition could apply the gradient twice."""
    session = create()
    fail(session, ONES, applied=applied)
    with stepwire.connect(target, channels=2) as elsewhere:
        elsewhere.session(session.session_id).step(TWOS)
    session.attach(take_over=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert counts(session) == [1 + applied] * 2
    assert values(session.pull()) == {-2.0 - applied}
    assert values(session.step(ONES)) == {-3.0 - applied}


def test_a_gradient_that_certainly_was_not_applied_is_a_new_step(create: Create, target: str) -> None:
    """The other client held the workers and stepped nothing, so the number of the step in doubt is free."""
    session = create()
    fail(session, ONES, applied=False)
    with stepwire.connect(target, channels=2) as elsewhere:
        elsewhere.session(session.session_id).attach()
    session.attach(take_over=True)
    assert values(session.step(ONES)) == {-1.0}
    assert counts(session) == [1, 1]


def test_a_step_that_another_client_left_half_applied_is_not_gone_on_with(target: str) -> None:
    """Neither shard takes a part of another gradient."""
    with stepwire.connect(target, channels=2) as first, stepwire.connect(target, channels=2) as second:
        session = first.create_session(START, optimizer=stepwire.SGD(lr=1.0), non_finite="allow")
        apply = ServerSession.apply
        with pytest.MonkeyPatch.context() as patched:
            seen: list[Any] = []

            def half(self: ServerSession, step: Any, chunk: Any, reply: Any) -> None:
                if seen:
                    raise UnavailableError("the connection broke", retry_after_seconds=1e9)
                seen.append(apply(self, step, chunk, reply))

            patched.setattr(ServerSession, "apply", half)
            with pytest.raises(StepwireError):
                session.step(ONES, overlap=True)
        found = second.session(session.session_id)
        with pytest.raises(stepwire.SessionNotReadyError) as refused:
            found.step(TWOS, overlap=True)
        assert refused.value.reason == Reason.STEP_UNFINISHED
        assert counts(found) == [0, 0]
        found.close()


def test_shards_tell_their_numbers_together(create: Create) -> None:
    session = create()
    session.step(ONES)
    statistics = session.statistics()
    assert (statistics.applied_step, statistics.attached, statistics.streams_opened) == (1, True, 2)
    assert [shard.last_result.step for shard in session.shards if shard.last_result is not None] == [1, 1]


# --- loads -------------------------------------------------------------------------------------------------


def half_load(session: stepwire.Session, value: float, *, of: int = 0, committed: bool = True) -> None:
    """Have one shard commit a load, perhaps without a reply, and the other one never get it."""
    upload = Calls.upload
    holder = session.session_id.split(",")[of]

    def broken(self: Calls, method: str, frames: Any, response: Any, deadline: Any) -> Any:
        first, *rest = frames
        if pb.LoadRequest.FromString(first).open.session_id == holder:
            loaded = upload(self, method, [first, *rest], response, deadline)
            if committed:
                return loaded
        raise DeadlineExceededError("the connection broke")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Calls, "upload", broken)
        with pytest.raises(DeadlineExceededError):
            session.load({"w": np.full(SIZE, value, np.float32)})


@pytest.mark.parametrize("replied", [True, False])
def test_a_model_of_two_loads_is_neither_stepped_nor_read(
    create: Create, replied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that one shard alone committed is told of, to every client, until another load levels the shards."""
    session = create()
    session.step(ONES)
    half_load(session, 100.0, committed=replied)
    never_repeat(session, monkeypatch)
    problem = "shard 0 on .* is at load 2, shard 1 on .* is at load 1.*Load again"
    for call in (session.pull, lambda: session.step(TWOS), session.pull):
        with pytest.raises(StepMismatchError, match=problem) as told:
            call()
        assert told.value.metadata == {"loads": "2,1"}
    assert counts(session) == [1, 1]
    session.load({"w": np.full(SIZE, 10.0, np.float32)})
    assert values(session.pull()) == {10.0}
    assert values(session.step(TWOS)) == {8.0}
    assert counts(session) == [2, 2]


@pytest.mark.parametrize("of", [0, 1])
def test_loads_that_fail_again_and_again_are_levelled_by_one_that_does_not(create: Create, of: int) -> None:
    session = create()
    for value in (100.0, 200.0, 300.0):
        half_load(session, value, of=of, committed=value != 200.0)
    session.load({"w": np.full(SIZE, 10.0, np.float32)})
    assert values(session.step(ONES)) == {9.0}


def test_another_client_is_told_of_two_loads_too_and_levels_them(target: str, create: Create) -> None:
    session = create()
    half_load(session, 100.0)
    with stepwire.connect(target, channels=2, timeout=120.0) as client:
        found = client.session(session.session_id)
        with pytest.raises(StepMismatchError, match="Load again"):
            found.step(ONES)
        assert counts(found) == [0, 0]
        found.load({"w": np.full(SIZE, 10.0, np.float32)})
        assert values(found.step(ONES)) == {9.0}
        assert counts(found) == [1, 1]


# --- commits that come late --------------------------------------------------------------------------------


def test_a_commit_that_waits_in_a_busy_server_wedges_no_later_step(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards decided, one connection broke, and the step was repeated; then a shard gets to the old commit."""
    waiting, released, over = queue.SimpleQueue[str](), threading.Event(), threading.Event()
    busy, refusals = threading.Lock(), list[StepwireError]()
    commit = ServerSession.commit

    def commit_late(self: ServerSession, step: Any, *arguments: Any) -> Any:
        if step.request.step != 2 or not busy.acquire(blocking=False):
            return commit(self, step, *arguments)
        waiting.put(self.ledger.session_id)
        assert released.wait(120.0)
        try:
            return commit(self, step, *arguments)
        except StepwireError as refusal:
            refusals.append(refusal)
            raise
        finally:
            over.set()

    with stepwire.connect(target, channels=2, timeout=120.0, transport="tcp") as client:
        session = client.create_session(START, optimizer=stepwire.SGD(lr=1.0), clip_grad_norm=1e9)
        session.step(ONES)
        monkeypatch.setattr(ServerSession, "commit", commit_late)
        step = session.step_async(ONES)
        shard = session.shards[session.session_id.split(",").index(waiting.get(timeout=120.0))]
        link: Any = shard._link
        monkeypatch.setattr(link.hold._stream, "_translated", lambda *_: UnavailableError("the connection broke"))
        link.hold._stream._call.cancel()
        assert values(step.result(120.0)) == {-2.0}
        released.set()
        assert over.wait(120.0)
        assert [refusal.reason for refusal in refusals] == [Reason.STREAM_DISPLACED]
        assert values(session.step(ONES)) == {-3.0}
        assert counts(session) == [3, 3]
        session.close()
