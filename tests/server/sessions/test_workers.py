"""Holds of a worker: each newer than the one before, and streams that have been displaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.errors import FencedError, Reason, SessionNotFoundError, UnavailableError
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
    worker = Worker(0)
    holders = [worker.acquire() for _ in range(3)]
    assert [(holder.worker, holder.generation) for holder in holders] == [(0, 1), (0, 2), (0, 3)]
    worker.check(holders[2])
    for holder in holders[:2]:
        with pytest.raises(FencedError, match=f"token {holder.generation}, now 3") as refused:
            worker.check(holder)
        assert refused.value.reason is Reason.FENCED
        assert refused.value.metadata == {"worker": "0", "token": str(holder.generation), "current_token": "3"}


def test_a_call_finds_the_present_hold_by_its_token_and_no_other() -> None:
    worker = Worker(0)
    worker.acquire()
    holder = worker.acquire()
    assert worker.holder_of(2) is holder
    for token in (0, 1, 3, 2**64 - 1):
        with pytest.raises(FencedError, match=f"token {token}, now 2"):
            worker.holder_of(token)


def test_nobody_holds_a_worker_at_first() -> None:
    worker = Worker(0)
    assert not worker.attached
    for attempt in (lambda: worker.holder_of(0), lambda: worker.renew(0, Stream())):
        with pytest.raises(FencedError):
            attempt()


def test_a_client_that_attaches_again_gets_a_new_hold_and_its_older_one_commits_nothing() -> None:
    worker = Worker(0)
    first = worker.acquire(Stream())
    second = worker.renew(first.generation, Stream())
    assert (second.generation, second.acquired, worker.attached) == (2, 1, True)
    worker.check(second)
    with pytest.raises(UnavailableError, match="newer stream of this client") as displaced:
        worker.check(first)
    assert displaced.value.reason is Reason.STREAM_DISPLACED
    assert displaced.value.metadata == {"worker": "0", "token": "1", "current_token": "2"}
    with pytest.raises(UnavailableError, match="generation 1, now 2") as called:
        worker.holder_of(first.generation)
    assert called.value.reason is Reason.STREAM_DISPLACED


def test_a_call_with_the_token_of_a_client_before_is_fenced() -> None:
    worker = Worker(0)
    worker.renew(worker.acquire().generation, Stream())
    worker.renew(worker.acquire().generation, Stream())
    for token, refusal in ((1, FencedError), (2, FencedError), (3, UnavailableError), (5, FencedError)):
        with pytest.raises(refusal, match=f"{token}, now 4"):
            worker.holder_of(token)


def test_an_attach_whose_answer_was_lost_is_repeated_with_the_token_before() -> None:
    worker = Worker(0)
    worker.acquire()
    assert [worker.renew(1, Stream()).generation for _ in range(3)] == [2, 3, 4]


def test_a_late_attach_of_the_past_displaces_a_stream_of_its_own_client_alone() -> None:
    """The client sees it at its next step, and attaches again: nothing is applied twice or lost."""
    worker, stream = Worker(0), Stream()
    worker.acquire()
    holder = worker.renew(1, stream)
    worker.check(holder)
    worker.renew(1, Stream())
    assert stream.orphaned
    with pytest.raises(UnavailableError, match="newer stream of this client"):
        worker.check(holder)
    worker.check(worker.renew(2, Stream()))


def test_a_token_of_the_future_attaches_nobody() -> None:
    worker = Worker(0)
    worker.acquire()
    with pytest.raises(FencedError, match="token 2, now 1"):
        worker.renew(2, Stream())


def test_a_token_of_another_client_attaches_nobody() -> None:
    worker, stream = Worker(0), Stream()
    worker.acquire()
    worker.acquire(stream)
    with pytest.raises(FencedError):
        worker.renew(1, Stream())
    assert (worker.holder.generation, stream.orphaned, stream.cancelled, worker.attached) == (2, False, 0, True)


def test_a_displaced_stream_waits_and_the_one_before_it_is_cancelled() -> None:
    worker, streams = Worker(0), [Stream() for _ in range(4)]
    for stream in streams:
        worker.acquire(stream)
    assert [stream.orphaned for stream in streams] == [True, True, True, False]
    assert [stream.cancelled for stream in streams] == [1, 1, 0, 0]


def test_a_stream_that_has_ended_is_forgotten() -> None:
    worker, first, second = Worker(0), Stream(), Stream()
    worker.acquire(first)
    worker.acquire(second)
    worker.detach(first)
    worker.acquire(Stream())
    assert (first.cancelled, second.cancelled, second.orphaned) == (0, 0, True)


def test_detaching_the_displaced_leaves_the_holder_attached() -> None:
    worker, first, second = Worker(0), Stream(), Stream()
    worker.acquire(first)
    worker.acquire(second)
    worker.detach(first)
    assert worker.attached
    worker.detach(second)
    assert not worker.attached


def test_the_end_of_a_session_ends_the_streams_that_wait_for_a_message() -> None:
    worker, displaced, holder = Worker(0), Stream(), Stream()
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
