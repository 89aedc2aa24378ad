"""The places of calls. A call that waits for its client gives its place to the next one, if there is no other.

Every call costs a thread, whoever makes it. So a client that sends no message, or reads no response, could keep others
out for as long as it liked. Where all places of a room are taken, the call that waits for its client makes room: one of
the connection with the most calls there, and of those the one that has waited longest. A call that waits for longer
than a bound ends anyway.

A call that waits for its message may hold nearly all of it: gRPC keeps the bytes and tells nobody. So a call that is
slow with its message counts as many bytes as a message may have, and all of them together have a bound.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from stepwire.errors import Reason, ResourceExhaustedError, StepwireError

__all__ = [
    "CALLS",
    "ENTRANCE",
    "FOLLOW",
    "HEALTH",
    "MOST_CALLS",
    "STREAMS",
    "WATCH",
    "CallRooms",
    "CallStatistics",
    "ClientCall",
]

ENTRANCE: Final = "entrance"
"""The room of calls that have not brought their message."""

CALLS: Final = "calls"
HEALTH: Final = "health"
WATCH: Final = "watch"
FOLLOW: Final = "follow"
"""The room of standbys: one follows at a time, and others come to take its place."""

STREAMS: Final = "streams"
"""The room of attached streams, which are counted elsewhere: here their unread replies alone are watched."""

# A message comes with its call. So where 128 calls are opened between a call and its message, it is a flood of them.
_PLACES: Final[Mapping[str, int]] = {ENTRANCE: 128, CALLS: 64, HEALTH: 32, WATCH: 16, FOLLOW: 8}
_OTHERS: Final = 16
_FEW: Final = 4
"""The places of `CALLS` beyond its own, for tenants that have few calls there: one with all others keeps nobody out."""

_ADMINISTRATORS: Final = 8
"""The places of `CALLS` beyond those that only administrators take."""

MOST_CALLS: Final = sum(_PLACES.values()) + _OTHERS + _ADMINISTRATORS
"""The places of all rooms that have a bound."""

_MOST_UNREAD: Final = 4096
_MOST_UNREAD_BYTES: Final = 64 << 20
"""The most responses, and their bytes, that nothing but their reader is missing from; gRPC holds something of each."""
_LARGEST_MESSAGE_BYTES: Final = 8 << 20
_MOST_UNFINISHED_BYTES: Final = 256 << 20
"""The most bytes of messages that calls are slow with, each counted as the largest one."""
_SLOW_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 1.0


_End: TypeAlias = Callable[[StepwireError], object]


class ClientCall:
    """One call.

    Attributes:
        peer: the connection that it came over.
        room: the name of its room.
        tenant: the tenant that it is of; None where callers have none.
        end: a function that ends it with an error, from any thread.
        cancel: a function that ends it, and drops what is not read of its responses, likewise.
        waits: it waits for its client: for a message, or until a response is read.
        receives: it waits for a message.
        since: the clock reading of the last message that it brought, or of the last response that it was given.
        unread_bytes: the bytes of its response, where nothing but the response is left.
    """

    def __init__(self, peer: str, room: str, end: _End, cancel: Callable[[], object], now: float) -> None:
        """Begin; `end` and `cancel` end the call."""
        self.peer = peer
        self.room = room
        self.tenant: str | None = None
        self.end = end
        self.cancel = cancel
        self.waits = self.receives = False
        self.since = now
        self.unread_bytes = 0


class CallStatistics(NamedTuple):
    """The calls under way.

    Attributes:
        total: all of them, those with it that nothing but a response is left of.
        rooms: the calls in each room.
        waiting: the calls in rooms that wait for their clients.
        unread_bytes: the bytes of responses that are not read.
    """

    total: int
    rooms: Mapping[str, int]
    waiting: int
    unread_bytes: int


class CallRooms:
    """The calls under way. Thread-safe."""

    def __init__(
        self,
        clock: Callable[[], float],
        silent_seconds: float,
        *,
        places: Mapping[str, int] = _PLACES,
        unread_bytes: int = _MOST_UNREAD_BYTES,
        message_bytes: int = _LARGEST_MESSAGE_BYTES,
    ) -> None:
        """Have no call yet.

        Args:
            clock: returns seconds.
            silent_seconds: the time that a call may wait for its client.
            places: the most calls in each room; a room that is not named has no bound.
            unread_bytes: the most bytes of responses that nothing but their reader is missing from.
            message_bytes: the bytes of the largest message that is received.
        """
        self._clock = clock
        self._silent_seconds = silent_seconds
        self._places = places
        self._unread_bytes = unread_bytes
        self._most_slow = max(_MOST_UNFINISHED_BYTES // message_bytes, 1)
        self._rooms: dict[str, set[ClientCall]] = {}
        self._unread: set[ClientCall] = set()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._leaving: deque[ClientCall] = deque()

    def statistics(self) -> CallStatistics:
        """Return the state as of now."""
        with self._alone():
            present = [call for calls in self._rooms.values() for call in calls]
            unread = self._held_bytes
            total = len(present) + len(self._unread)
        return CallStatistics(
            total, dict(Counter(call.room for call in present)), sum(call.waits for call in present), unread
        )

    def enter(
        self,
        peer: str,
        room: str,
        end: _End,
        cancel: Callable[[], object],
        is_administrator: Callable[[], bool] = lambda: False,
    ) -> ClientCall:
        """Begin a call.

        Args:
            peer: the connection that it comes over.
            room: its room.
            end: ends it with an error, from any thread.
            cancel: ends it, and drops what is not read of its responses, from any thread.
            is_administrator: tells whether an administrator makes it; asked where all places are taken.

        Raises:
            ResourceExhaustedError: all places are taken, and no call waits for its client.
        """
        call = ClientCall(peer, room, end, cancel, self._clock())
        self._place(call, room, is_administrator)
        return call

    def move(self, call: ClientCall, room: str, is_administrator: Callable[[], bool]) -> None:
        """Move a call to another room.

        Raises:
            ResourceExhaustedError: as `enter`.
        """
        self._place(call, room, is_administrator)

    def leave(self, call: ClientCall) -> None:
        """End a call, or what is left of it. Leaving twice is harmless.

        The collector may bring any thread here, with the lock or without it. So nobody waits for the lock: whoever has
        it lets the call go at the end.
        """
        self._leaving.append(call)
        self._let_go()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the lock for a block, after the calls that have left, and before those that leave meanwhile."""
        try:
            with self._lock:
                self._forget_those_that_left()
                yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        while self._leaving and self._lock.acquire(blocking=False):
            try:
                self._forget_those_that_left()
            finally:
                self._lock.release()

    def _forget_those_that_left(self) -> None:
        while self._leaving:
            call = self._leaving.popleft()
            self._rooms.get(call.room, set()).discard(call)
            self._forget(call)

    def wait(self, call: ClientCall, *, receives: bool = False) -> None:
        """Note that a call waits for its client; it `receives` where a message is missing."""
        call.since = self._clock()
        call.waits, call.receives = True, receives

    def replied(self, call: ClientCall, size: int) -> None:
        """Note that nothing but a response of so many bytes is left of a call. `leave` follows once it is read.

        Beyond the bound of such bytes, responses of the connection with most of them are dropped, the oldest first.
        """
        call.waits, call.since = True, self._clock()
        with self._alone():
            self._rooms.get(call.room, set()).discard(call)
            call.unread_bytes = size
            self._unread.add(call)
            self._held_bytes += size
            dropped = self._surplus()
        for each in dropped:
            each.cancel()

    def hurry(self, silent_seconds: float) -> None:
        """From now on cancel the calls that have waited for so long: the server drains, and waits for them."""
        self._silent_seconds = min(self._silent_seconds, silent_seconds)

    def end_silent(self) -> None:
        """Cancel the calls that have waited for their clients for too long, and end those that are slow beyond bound.

        Those are of the connection with the most slow calls, the oldest first.
        """
        self.end_slow(self._most_slow)
        before = self._clock() - self._silent_seconds
        with self._alone():
            present = [*self._unread, *(call for calls in self._rooms.values() for call in calls)]
            silent = [call for call in present if call.waits and call.since < before and call.room != WATCH]
        for call in silent:
            call.cancel()

    def end_slow(self, most: int = 0) -> int:
        """End calls that are slow with their messages, until so many are left; return the number of those that end."""
        beyond = self._slow_beyond(most)
        for call in beyond:
            call.end(_too_many("messages", self._most_slow))
        return len(beyond)

    def _slow_beyond(self, most: int) -> list[ClientCall]:
        before = self._clock() - _SLOW_SECONDS
        with self._alone():
            slow = {call for calls in self._rooms.values() for call in calls if call.receives and call.since < before}
        beyond = []
        while len(slow) > most and (call := _displaced(slow)) is not None:
            slow.discard(call)
            beyond.append(call)
        return beyond

    def _place(self, call: ClientCall, room: str, is_administrator: Callable[[], bool]) -> None:
        """Give a call a place in a room, and take the one that it has."""
        most = self._places.get(room)
        with self._alone():
            calls = self._rooms.setdefault(room, set())
            displaced = _displaced(calls) if most is not None and len(calls) >= most else None
            full = most is not None and len(calls) >= most and displaced is None
            if not full:
                self._seat(call, room, displaced)
        if displaced is not None and displaced.receives:
            displaced.end(_too_many(room, most))
        elif displaced is not None:  # an error would wait behind the response that nobody reads, and keep its thread
            displaced.cancel()
        if full:
            self._place_beyond(call, room, is_administrator)

    def _place_beyond(self, call: ClientCall, room: str, is_administrator: Callable[[], bool]) -> None:
        """Give a call one of the places that are kept for administrators, and for tenants with few calls."""
        most, beyond = self._places[room], 0
        if room == CALLS and is_administrator():
            beyond = _OTHERS + _ADMINISTRATORS
        with self._alone():
            calls = self._rooms[room]
            if room == CALLS and call.tenant is not None and not beyond:
                beyond = _OTHERS if sum(each.tenant == call.tenant for each in calls) < _FEW else 0
            if len(calls) < most + beyond:
                self._seat(call, room, None)
                return
        raise _too_many(room, most)

    def _seat(self, call: ClientCall, room: str, displaced: ClientCall | None) -> None:
        if displaced is not None:
            self._rooms[room].discard(displaced)
        self._rooms.get(call.room, set()).discard(call)
        self._rooms[room].add(call)
        call.room, call.waits, call.receives = room, False, False

    def _surplus(self) -> list[ClientCall]:
        """Take out the responses that are dropped."""
        if self._held_bytes <= self._unread_bytes and len(self._unread) <= _MOST_UNREAD:
            return []
        held = Counter[str]()
        for call in self._unread:
            held[call.peer] += call.unread_bytes
        dropped = []
        while len(self._unread) > 1 and (self._held_bytes > self._unread_bytes or len(self._unread) > _MOST_UNREAD):
            call = min(self._unread, key=lambda each: (-held[each.peer], each.since))
            held[call.peer] -= call.unread_bytes
            self._forget(call)
            dropped.append(call)
        return dropped

    def _forget(self, call: ClientCall) -> None:
        """Count a response no longer."""
        if call in self._unread:
            self._unread.discard(call)
            self._held_bytes -= call.unread_bytes


def _displaced(calls: set[ClientCall]) -> ClientCall | None:
    """Return the call that makes room; None if none waits for its client."""
    held = Counter(call.peer for call in calls)
    waiting = [call for call in calls if call.waits]
    return min(waiting, key=lambda call: (-held[call.peer], call.since), default=None)


def _too_many(room: str, most: int | None) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"the server has {most} calls ({room}), its most, and this one found no place or gave it up while it waited "
        "for its client; repeat it",
        reason=Reason.TOO_MANY_CALLS,
        metadata={"limit": room, "most": most},
        retry_after_seconds=_RETRY_SECONDS,
    )
