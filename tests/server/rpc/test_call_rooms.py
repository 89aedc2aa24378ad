"""The places of calls: who gives place to whom, and what ends for its silence."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.rpc.call_rooms import CALLS, STREAMS, WATCH, CallRooms, ClientCall

PLACES = {CALLS: 3, WATCH: 1}


class Ended(list[tuple[str, str]]):
    """The names of calls that were ended, each with its way."""


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def rooms(clock: Any) -> CallRooms:
    return CallRooms(clock, 60.0, places=PLACES, unread_bytes=100)


def enter(rooms: CallRooms, ended: Ended, name: str, room: str = CALLS, admin: bool = False) -> ClientCall:
    """Enter a call that is named PEER or PEER/CALL."""
    return rooms.enter(
        name.partition("/")[0],
        room,
        lambda error: ended.append((name, str(error.reason))),
        lambda: ended.append((name, "cancelled")),
        lambda: admin,
    )


def waiting(rooms: CallRooms, ended: Ended, clock: Any, *names: str) -> list[ClientCall]:
    """Enter calls that wait for their clients, a second after one another."""
    calls = []
    for name in names:
        calls.append(enter(rooms, ended, name))
        rooms.wait(calls[-1])
        clock.now += 1.0
    return calls


def test_a_call_takes_the_place_of_the_one_that_has_waited_longest(rooms: CallRooms, ended: Ended, clock: Any) -> None:
    """A missing message is told; an error behind a response that nobody reads would keep its thread for ever."""
    calls = waiting(rooms, ended, clock, "a", "b", "c")
    for call in calls[1:]:
        rooms.wait(call, receives=True)
        clock.now += 1.0
    for name in "de":
        enter(rooms, ended, name)
    assert ended == [("a", "cancelled"), ("b", "TOO_MANY_CALLS")]
    assert rooms.statistics().rooms.get(CALLS, 0) == 3


def test_a_connection_with_many_calls_gives_up_one_of_its_own_first(rooms: CallRooms, ended: Ended, clock: Any) -> None:
    waiting(rooms, ended, clock, "honest", "flood/1", "flood/2")
    for number in range(3, 9):
        (call,) = waiting(rooms, ended, clock, f"flood/{number}")
    assert [name for name, _ in ended] == [f"flood/{number}" for number in range(1, 7)]
    assert call.room == CALLS


def test_a_call_at_work_is_not_displaced_and_the_next_one_is_refused(rooms: CallRooms, ended: Ended) -> None:
    for name in "abc":
        enter(rooms, ended, name)
    with pytest.raises(ResourceExhaustedError, match="the server has 3 calls") as refused:
        enter(rooms, ended, "d")
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.TOO_MANY_CALLS, 1.0)
    assert refused.value.metadata == {"limit": "calls", "most": "3"}
    assert (ended, rooms.statistics().rooms.get(CALLS, 0)) == ([], 3)


def test_administrators_have_places_that_nobody_else_takes(rooms: CallRooms, ended: Ended) -> None:
    for name in "abc":
        enter(rooms, ended, name)
    admins = [enter(rooms, ended, f"admin/{number}", admin=True) for number in range(24)]
    with pytest.raises(ResourceExhaustedError):
        enter(rooms, ended, "admin/24", admin=True)
    rooms.leave(admins[0])
    with pytest.raises(ResourceExhaustedError):
        enter(rooms, ended, "d")
    assert enter(rooms, ended, "admin/24", admin=True).room == CALLS


def test_a_tenant_with_all_places_keeps_no_other_out(rooms: CallRooms, ended: Ended) -> None:
    """A call at work is not displaced, and creations of one tenant wait for one another."""

    def of(tenant: str, number: int) -> ClientCall:
        call = enter(rooms, ended, f"{tenant}/{number}", WATCH)
        call.tenant = tenant
        with contextlib.ExitStack() as stack:
            stack.callback(rooms.leave, call)
            rooms.move(call, CALLS, lambda: False)
            stack.pop_all()
        return call

    for number in range(4):
        of("greedy", number)
    with pytest.raises(ResourceExhaustedError):
        of("greedy", 4)
    others = [of(name, number) for number in range(3) for name in "abcde"]
    with pytest.raises(ResourceExhaustedError):
        of("f", 0)
    assert enter(rooms, ended, "admin", admin=True).room == CALLS
    rooms.leave(others[0])
    rooms.leave(others[1])
    assert of("f", 0).room == CALLS
    assert ended == []


def test_a_call_may_end_in_the_middle_of_any_other_look(rooms: CallRooms, ended: Ended) -> None:
    """The collector ends abandoned streams in whatever thread it runs, and that one may have the lock."""
    calls = [enter(rooms, ended, name) for name in "ab"]

    class Collecting(set[ClientCall]):
        def __iter__(self) -> Any:
            rooms.leave(calls[0])
            return super().__iter__()

    rooms._rooms[CALLS] = Collecting(calls)
    look = threading.Thread(target=rooms.statistics, daemon=True)
    look.start()
    look.join(60.0)
    assert not look.is_alive(), "it waits for itself"
    rooms._rooms[CALLS] = set(rooms._rooms[CALLS])
    assert (rooms.statistics().total, calls[0] in rooms._rooms[CALLS]) == (1, False)


def test_a_call_that_moves_leaves_its_room_and_is_at_work(rooms: CallRooms, ended: Ended) -> None:
    call = enter(rooms, ended, "a", WATCH)
    rooms.wait(call)
    rooms.move(call, CALLS, lambda: False)
    assert (rooms.statistics().rooms.get(WATCH, 0), rooms.statistics().rooms.get(CALLS, 0), call.waits) == (0, 1, False)
    rooms.leave(call)
    rooms.leave(call)
    assert rooms.statistics().rooms.get(CALLS, 0) == 0


def test_a_call_that_waits_for_too_long_is_cancelled(rooms: CallRooms, ended: Ended, clock: Any) -> None:
    watch, silent = enter(rooms, ended, "watch", WATCH), enter(rooms, ended, "silent")
    stream, works = enter(rooms, ended, "stream", STREAMS), enter(rooms, ended, "works")
    for call in (watch, silent, stream):
        rooms.wait(call)
    clock.now += 60.0
    rooms.end_silent()
    assert ended == []
    clock.now += 0.1
    rooms.end_silent()
    assert sorted(ended) == [("silent", "cancelled"), ("stream", "cancelled")]
    assert works.waits is False


def test_calls_that_are_slow_with_their_messages_have_a_bound_in_bytes(ended: Ended, clock: Any) -> None:
    """256 MiB together, each counted as the largest message: here two of them."""
    rooms = CallRooms(clock, 60.0, places={CALLS: 100}, message_bytes=128 << 20)
    for name in ("honest", "flood/1", "flood/2"):
        rooms.wait(enter(rooms, ended, name), receives=True)
        clock.now += 0.1
    reading = enter(rooms, ended, "reads")
    rooms.wait(reading)  # until its response is read, which is no message
    rooms.end_silent()
    assert ended == []  # nobody is slow yet
    clock.now += 1.0
    rooms.wait(enter(rooms, ended, "new"), receives=True)
    rooms.end_silent()
    assert ended == [("flood/1", "TOO_MANY_CALLS")]


def test_unread_responses_have_a_bound_that_the_connection_with_most_of_them_pays(
    rooms: CallRooms, ended: Ended, clock: Any
) -> None:
    calls = {name: enter(rooms, ended, name, STREAMS) for name in ("flood/1", "honest", "flood/2", "flood/3")}
    for name, size in {"flood/1": 30, "honest": 20, "flood/2": 30}.items():
        rooms.replied(calls[name], size)
        clock.now += 1.0
    assert (ended, rooms.statistics().unread_bytes) == ([], 80)
    rooms.replied(calls["flood/3"], 30)
    assert (ended, rooms.statistics().unread_bytes) == ([("flood/1", "cancelled")], 80)
    rooms.leave(calls["flood/2"])
    assert rooms.statistics().unread_bytes == 50


def test_one_response_may_be_larger_than_the_bound(rooms: CallRooms, ended: Ended) -> None:
    rooms.replied(enter(rooms, ended, "a"), 1000)
    assert (ended, rooms.statistics().unread_bytes) == ([], 1000)


def test_responses_of_no_bytes_have_a_bound_too(rooms: CallRooms, ended: Ended, clock: Any) -> None:
    for number in range(4096):
        rooms.replied(enter(rooms, ended, f"flood/{number}", STREAMS), 0)
        clock.now += 1e-3
    assert ended == []
    rooms.replied(enter(rooms, ended, "honest", STREAMS), 0)
    assert ended == [("flood/0", "cancelled")]
    assert (rooms.statistics().total, rooms.statistics().unread_bytes) == (4096, 0)
