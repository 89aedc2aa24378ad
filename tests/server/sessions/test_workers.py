"""Holds of a worker: each newer than the one before, and streams that have been displaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.errors import FencedError, Reason, SessionNotFoundError, UnavailableError
from stepwire_server.sessions.attach_tokens import AttachTokens
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.workers import Worker

IDLE_SECONDS = 60.0


class Stream(ClientStream):
    """A stream that counts its cancellations."""

    def __init__(self) -> None:
        self.cancelled = 0
        super().__init__(self._count, 0.0)

    def _count(self) -> None:
        self.cancelled += 1


def test_each_acquiring_gives_the_next_generation_and_fences_the_holds_before() -> None:
    worker = Worker(0, AttachTokens())
    holders = [worker.acquire() for _ in range(3)]
    assert [(holder.worker, holder.generation) for holder in holders] == [(0, 1), (0, 2), (0, 3)]
    worker.check(holders[2])
    for holder in holders[:2]:
        with pytest.raises(FencedError, match="held by another client") as refused:
            worker.check(holder)
        assert refused.value.reason is Reason.FENCED
        assert refused.value.metadata == {"worker": "0"}


def test_the_attempts_of_one_acquisition_are_of_one_client() -> None:
    """The one that was answered may be followed by one that was delayed; the client knows nothing of that one."""
    worker = Worker(0, AttachTokens())
    first = worker.acquire(Stream(), acquisition=7)
    ghost = worker.acquire(Stream(), acquisition=7)
    assert [(each.generation, each.acquired) for each in (first, ghost)] == [(1, 1), (2, 1)]
    with pytest.raises(UnavailableError, match="newer stream of this client"):
        worker.check(first)
    back = worker.renew(first.token, Stream())
    assert worker.acquire(Stream(), acquisition=7).acquired == back.acquired == 1
    for number in (8, 7, 0, 0):
        before = worker.holder
        holder = worker.acquire(Stream(), acquisition=number)
        assert holder.acquired == holder.generation
        with pytest.raises(FencedError):
            worker.check(before)


def test_a_call_finds_the_present_hold_by_its_token_and_no_other() -> None:
    worker = Worker(0, AttachTokens())
    first = worker.acquire()
    holder = worker.acquire()
    assert worker.holder_of(holder.token) is holder
    for token in (0, 1, 2, 3, first.token, holder.token ^ 1, 2**64 - 1):
        with pytest.raises(FencedError, match="held by another client"):
            worker.holder_of(token)


def test_the_holder_of_a_parked_session_is_found_by_the_token_that_it_had() -> None:
    tokens = AttachTokens()
    before, after, elsewhere = Worker(0, tokens), Worker(0, tokens), Worker(0, AttachTokens())
    held = before.renew(before.acquire().token, Stream())
    for worker in (after, elsewhere):
        worker.restore(1, 1)
        worker.resume(held.generation)
    assert after.holder_of(held.token) is after.holder
    with pytest.raises(FencedError):  # it has another key: the token was not given out there
        elsewhere.holder_of(held.token)


def test_the_client_of_an_earlier_server_comes_back_with_any_of_its_tokens() -> None:
    tokens = AttachTokens()
    before, after = Worker(0, tokens), Worker(0, tokens)
    stranger = before.acquire().token
    own = [before.acquire().token]
    own.append(before.renew(own[0], Stream()).token)
    after.restore(2, 2)
    for token in own:
        assert after.renew(token, Stream()).token not in (0, stranger, *own)
    with pytest.raises(FencedError):
        after.renew(stranger, Stream())


def test_nobody_holds_a_worker_at_first() -> None:
    worker = Worker(0, AttachTokens())
    assert not worker.attached
    for attempt in (lambda: worker.holder_of(0), lambda: worker.renew(0, Stream())):
        with pytest.raises(FencedError):
            attempt()


def test_a_client_that_attaches_again_gets_a_new_hold_and_its_older_one_commits_nothing() -> None:
    worker = Worker(0, AttachTokens())
    first = worker.acquire(Stream())
    second = worker.renew(first.token, Stream())
    assert (second.generation, second.acquired, worker.attached) == (2, 1, True)
    worker.check(second)
    with pytest.raises(UnavailableError, match="newer stream of this client") as displaced:
        worker.check(first)
    assert displaced.value.reason is Reason.STREAM_DISPLACED
    assert displaced.value.metadata == {"worker": "0"}
    with pytest.raises(UnavailableError, match="newer stream of this client") as called:
        worker.holder_of(first.token)
    assert called.value.reason is Reason.STREAM_DISPLACED


def test_a_call_with_the_token_of_a_client_before_is_fenced() -> None:
    worker = Worker(0, AttachTokens())
    first = worker.acquire()
    renewed = worker.renew(first.token, Stream())
    second = worker.acquire()
    last = worker.renew(second.token, Stream())
    for token, refusal in (
        (first.token, FencedError),
        (renewed.token, FencedError),
        (second.token, UnavailableError),
        (5, FencedError),
    ):
        with pytest.raises(refusal):
            worker.holder_of(token)
    assert worker.holder_of(last.token) is last


def test_an_attach_whose_answer_was_lost_is_repeated_with_the_token_before() -> None:
    worker = Worker(0, AttachTokens())
    token = worker.acquire().token
    assert [worker.renew(token, Stream()).generation for _ in range(3)] == [2, 3, 4]


def test_a_late_attach_of_the_past_displaces_a_stream_of_its_own_client_alone() -> None:
    """The client sees it at its next step, and attaches again: nothing is applied twice or lost."""
    worker, stream = Worker(0, AttachTokens()), Stream()
    token = worker.acquire().token
    holder = worker.renew(token, stream)
    worker.check(holder)
    worker.renew(token, Stream())
    assert stream.orphaned
    with pytest.raises(UnavailableError, match="newer stream of this client"):
        worker.check(holder)
    worker.check(worker.renew(holder.token, Stream()))


def test_a_token_of_the_future_or_of_another_worker_attaches_nobody() -> None:
    tokens = AttachTokens()
    worker = Worker(0, tokens)
    worker.acquire()
    for token in (2, tokens.token(0, 2), tokens.token(1, 1)):
        with pytest.raises(FencedError, match="held by another client"):
            worker.renew(token, Stream())


def test_a_token_of_another_client_attaches_nobody() -> None:
    worker, stream = Worker(0, AttachTokens()), Stream()
    token = worker.acquire().token
    worker.acquire(stream)
    with pytest.raises(FencedError):
        worker.renew(token, Stream())
    assert (worker.holder.generation, stream.orphaned, stream.cancelled, worker.attached) == (2, False, 0, True)


def test_a_displaced_stream_waits_and_the_one_before_it_is_cancelled() -> None:
    worker, streams = Worker(0, AttachTokens()), [Stream() for _ in range(4)]
    for stream in streams:
        worker.acquire(stream)
    assert [stream.orphaned for stream in streams] == [True, True, True, False]
    assert [stream.cancelled for stream in streams] == [1, 1, 0, 0]


def test_a_stream_that_has_ended_is_forgotten() -> None:
    worker, first, second = Worker(0, AttachTokens()), Stream(), Stream()
    worker.acquire(first)
    worker.acquire(second)
    worker.detach(first)
    worker.acquire(Stream())
    assert (first.cancelled, second.cancelled, second.orphaned) == (0, 0, True)


def test_detaching_the_displaced_leaves_the_holder_attached() -> None:
    worker, first, second = Worker(0, AttachTokens()), Stream(), Stream()
    worker.acquire(first)
    worker.acquire(second)
    worker.detach(first)
    assert worker.attached
    worker.detach(second)
    assert not worker.attached


def test_the_end_of_a_session_ends_the_streams_that_wait_for_a_message() -> None:
    worker, displaced, holder = Worker(0, AttachTokens()), Stream(), Stream()
    error = SessionNotFoundError("gone")
    worker.end(error)
    worker.acquire(displaced)
    worker.acquire(holder)
    refused: list[Any] = []
    waiting = displaced.received(told(lambda: worker.end(error)))
    displaced.refuse = refused.append
    assert list(waiting) == []
    assert refused == [error]
    assert (displaced.cancelled, holder.cancelled) == (0, 0)
    with pytest.raises(SessionNotFoundError, match="gone"):  # it was busy, and is told before it waits again
        next(holder.received(iter(["message"])))


def told(happens: Callable[[], object]) -> Iterator[str]:
    """Be an iterator of messages that ends while somebody waits for the first one."""
    happens()
    yield from ()


def test_a_stream_without_a_way_to_refuse_is_cancelled() -> None:
    stream = Stream()
    assert list(stream.received(told(lambda: stream.end(SessionNotFoundError("gone"))))) == []
    assert stream.cancelled == 1


def test_messages_pass_a_stream_and_are_not_kept() -> None:
    stream = Stream()

    class Message: ...

    messages = stream.received(iter(Message, None))
    kept = weakref.ref(next(messages))
    assert kept() is None


@pytest.mark.parametrize(
    ("in_step", "orphaned", "silence", "overdue"),
    [
        (False, False, 1e9, False),
        (True, False, IDLE_SECONDS, False),
        (True, False, IDLE_SECONDS + 0.1, True),
        (False, True, IDLE_SECONDS + 0.1, True),
        (False, True, 1.0, False),
    ],
)
def test_silence_counts_only_where_it_must_not_be(in_step: bool, orphaned: bool, silence: float, overdue: bool) -> None:
    stream = Stream()
    stream.in_step, stream.orphaned, stream.last_seen = in_step, orphaned, 100.0
    assert stream.overdue(100.0 + silence, IDLE_SECONDS) is overdue
