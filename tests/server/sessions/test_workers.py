"""Tokens that tell their age, and streams that have been displaced."""

from __future__ import annotations

import pytest

from stepwire.errors import FencedError, Reason
from stepwire_server.sessions.client_stream import Attachment
from stepwire_server.sessions.workers import Worker

IDLE_SECONDS = 60.0


class Stream(Attachment):
    """An attachment that counts its cancellations."""

    def __init__(self) -> None:
        self.cancelled = 0
        super().__init__(self._count, 0.0)

    def _count(self) -> None:
        self.cancelled += 1


def test_each_taking_gives_the_next_token_and_fences_the_ones_before() -> None:
    slot = Worker(0)
    assert [slot.take(), slot.take(), slot.take()] == [1, 2, 3]
    slot.check(3)
    for token in (0, 1, 2, 4, 2**64 - 1):
        with pytest.raises(FencedError, match=f"token {token}, now 3") as refused:
            slot.check(token)
        assert refused.value.reason is Reason.FENCED
        assert refused.value.metadata == {"slot": "0", "token": str(token), "current_token": "3"}


def test_attaching_without_a_token_takes_the_slot() -> None:
    slot, stream = Worker(0), Stream()
    assert (slot.attach(stream, 0), stream.token, slot.attached) == (1, 1, True)
    assert slot.attach(Stream(), 0) == 2


def test_attaching_with_the_newest_token_keeps_it() -> None:
    slot = Worker(0)
    slot.take()
    assert (slot.attach(Stream(), 1), slot.token) == (1, 1)


def test_attaching_with_an_old_token_changes_nothing() -> None:
    slot, holder = Worker(0), Stream()
    slot.take()
    slot.attach(holder, 0)
    with pytest.raises(FencedError):
        slot.attach(Stream(), 1)
    assert (slot.token, holder.orphaned, holder.cancelled, slot.attached) == (2, False, 0, True)


def test_a_displaced_stream_waits_and_the_one_before_it_is_cancelled() -> None:
    slot, streams = Worker(0), [Stream() for _ in range(4)]
    for stream in streams:
        slot.attach(stream, 0)
    assert [stream.orphaned for stream in streams] == [True, True, True, False]
    assert [stream.cancelled for stream in streams] == [1, 1, 0, 0]


def test_a_stream_that_has_ended_is_forgotten() -> None:
    slot, first, second = Worker(0), Stream(), Stream()
    slot.attach(first, 0)
    slot.attach(second, 0)
    slot.detach(first)
    slot.attach(Stream(), 0)
    assert (first.cancelled, second.cancelled, second.orphaned) == (0, 0, True)


def test_detaching_the_displaced_leaves_the_holder_attached() -> None:
    slot, first, second = Worker(0), Stream(), Stream()
    slot.attach(first, 0)
    slot.attach(second, 0)
    slot.detach(first)
    assert slot.attached
    slot.detach(second)
    assert not slot.attached


def test_a_slot_without_its_session_orphans_its_stream() -> None:
    slot, stream = Worker(0), Stream()
    slot.orphan()
    slot.attach(stream, 0)
    slot.orphan()
    assert (stream.orphaned, stream.cancelled) == (True, 0)


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
