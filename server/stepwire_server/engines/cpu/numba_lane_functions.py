"""The parts of a compiled lane that all kernels have in common: from the datagram that comes to the reply that leaves.

`numba_lane` writes these functions out beside those of a kernel. Each is Python too, so a test can run them turn by
turn beside another thread. All that they need lies in one row of words, with the addresses of the rest: `lane_words`.

**The word.** A lane is granted (OPEN), in a step (BUSY), or nobody's (OVER). Only the loop takes the word from OPEN to
BUSY, and from there back or to OVER. Only the session's lock takes it from OPEN to OVER, and waits while it is BUSY. So
each grant has one end, and whoever ends it rings the bell of the stream's thread, once. That thread sleeps during the
grant. So no buffer goes and no descriptor is closed while the loop may use it.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any, Final

import numba
import numba.core.types as numba_types
from numpy import float64, int64, uint8, uint32

from stepwire.optimizers.norms import RELATIVE_ERROR, candidates, clip_keras, clip_optax, clip_torch, rounded
from stepwire.wire.packets import SPIN_MISSES, SPIN_REST
from stepwire_server.engines.cpu import numba_words
from stepwire_server.engines.cpu.lane_words import (
    APPLY,
    BEGAN,
    BELL,
    BLOCKS,
    BUSY,
    CAPACITY,
    CLIP,
    CLIPPED_NORM,
    COEFFICIENT,
    COLUMNS,
    COUNT,
    COUNTER_COUNT,
    COUNTERS,
    DOUBLE_COUNT,
    DOUBLES,
    EVENT,
    EVENT_LANE,
    EVENT_WORDS,
    EXPECTED,
    FD,
    GROUP_CLIPPED,
    GROUP_COEFFICIENT,
    GROUP_COLUMNS,
    GROUP_NORM,
    GROUPS,
    HEAD,
    LANE_CONSTANTS,
    LENGTH,
    NORM,
    NOT_RECEIVED,
    NUMBERS,
    ONE,
    OPEN,
    OVER,
    PARTIALS,
    PREVIOUS_SEND,
    RANGE_COUNT,
    RANGES,
    RECEIVED,
    RECORD_COLUMNS,
    RECORDS,
    REPLY,
    REPLY_LENGTH,
    ROW,
    ROWS,
    SELF,
    SEND,
    TIME,
    UNSENT,
    WIDTH,
)
from stepwire_server.engines.protocol import GRAIN

__all__ = ["LANE_FUNCTIONS", "LANE_NUMBERS", "advance", "is_next", "norm_of", "serve"]

# The numbers of Linux for a receive and a send that do not wait, for EPOLL_CTL_MOD, and for CLOCK_MONOTONIC.
AT_ONCE, QUIETLY = int(socket.MSG_DONTWAIT), int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0))
MODIFY, MONOTONIC = 3, 1
GRANT_SECONDS = 1.0

LANE_NUMBERS: Final[dict[str, float]] = {
    **LANE_CONSTANTS,
    "AT_ONCE": AT_ONCE,
    "QUIETLY": QUIETLY,
    "MODIFY": MODIFY,
    "MONOTONIC": MONOTONIC,
    "GRANT_SECONDS": GRANT_SECONDS,
    "SPIN_MISSES": SPIN_MISSES,
    "SPIN_REST": SPIN_REST,
    "GRAIN": GRAIN,
    "RELATIVE_ERROR": RELATIVE_ERROR,
}
"""The numbers in these functions, by name."""

carray: Any = vars(numba)["carray"]
exchange: Any = numba_words.exchange
pointer: Any = numba_words.pointer
publish: Any = numba_words.publish
_INT, _WORD = numba_types.intc, numba_types.intp
recv: Any = numba_types.ExternalFunction("recv", _WORD(_INT, _WORD, _WORD, _INT))
send: Any = numba_types.ExternalFunction("send", _WORD(_INT, _WORD, _WORD, _INT))
write: Any = numba_types.ExternalFunction("write", _WORD(_INT, _WORD, _WORD))
epoll_ctl: Any = numba_types.ExternalFunction("epoll_ctl", _INT(_INT, _INT, _INT, _WORD))
epoll_wait: Any = numba_types.ExternalFunction("epoll_wait", _INT(_INT, _WORD, _INT, _INT))
clock_gettime: Any = numba_types.ExternalFunction("clock_gettime", _INT(_INT, _WORD))


def _absent(*arguments: Any) -> Any:
    """Stand for a kernel, which the module of a lane has."""
    raise NotImplementedError


sum_of_squares: Any = _absent
stepped: Any = _absent


def serve(address: Any, epoll: int) -> None:
    """Serve the datagram that has come on a lane, or hand it over to Python as it is.

    Args:
        address: of the lane's row of words.
        epoll: the descriptor of the loop's epoll, whose event for this lane is used up.
    """
    if not exchange(address, OPEN, BUSY):
        return
    at = carray(pointer(address), WIDTH, int64)
    count = recv(at[FD], at[RECEIVED], at[CAPACITY], AT_ONCE)
    if count == at[LENGTH] and at[ROW] < at[ROWS] and is_recent(at) and is_next(at) and stepped(at):
        if replied(at):
            advance(at)
            epoll_ctl(epoll, MODIFY, at[FD], address + 8 * EVENT)
            publish(address, OPEN)
            return
        at[UNSENT], count = 1, NOT_RECEIVED
    at[COUNT] = count
    bell = at[BELL]
    publish(address, OVER)
    write(bell, address + 8 * ONE, 8)


def is_next(at: Any) -> bool:
    """Tell whether the head of the datagram is that of the next step: every byte, its number among them."""
    received = carray(pointer(at[RECEIVED]), at[HEAD], uint8)
    expected = carray(pointer(at[EXPECTED]), at[HEAD], uint8)
    other = 0
    for i in range(at[HEAD]):
        other |= received[i] ^ expected[i]
    return other == 0


def is_recent(at: Any) -> bool:
    """Tell whether the first step of the grant is not long ago: those who keep account of steps hear of it in time."""
    if at[ROW] == 0:
        return True
    first = carray(pointer(at[RECORDS]), 1, float64)
    return bool(now(at) - first[BEGAN] < GRANT_SECONDS)


def record_of(at: Any) -> Any:
    """Return the record of the present step, `(columns,) float64`."""
    columns = at[RECORD_COLUMNS]
    return carray(pointer(at[RECORDS] + 8 * columns * at[ROW]), columns, float64)


def now(at: Any) -> float:
    """Return the seconds of the monotonic clock."""
    clock_gettime(MONOTONIC, at[SELF] + 8 * TIME)
    return float64(at[TIME]) + float64(at[TIME + 1]) * 1e-9


def norm_of(total: float) -> float:
    """Return the norm of a sum of squares; −1 where Python decides: NaN, Inf, and a norm in doubt."""
    if total == 0.0:
        return 0.0
    if not math.isfinite(total):
        return -1.0
    low, high = candidates(total)
    return low if low == high else -1.0


def factor_of(norm: float, bound: float, formula: int) -> float:
    """Return the factor of clipping by a formula of `CLIPS`, counted from 1; 1 without one."""
    if formula == 1:
        return clip_torch(norm, bound)
    if formula == 2:
        return clip_optax(norm, bound)
    if formula == 3:
        return clip_keras(norm, bound)
    return 1.0


def measured(at: Any, gradient: Any, record: Any) -> bool:
    """Note the norms of a gradient and the factor of clipping; False where Python decides, and nothing is changed."""
    numbers = carray(pointer(at[NUMBERS]), 3, float64)
    ranges = carray(pointer(at[RANGES]), (at[RANGE_COUNT], 3), int64)
    partials = carray(pointer(at[PARTIALS]), (1, at[BLOCKS]), float64)
    for group in range(at[GROUPS]):
        record[COLUMNS + GROUP_COLUMNS * group] = 0.0
    for index in range(at[RANGE_COUNT]):
        begin, size, group = ranges[index, 0], ranges[index, 1], ranges[index, 2]
        sum_of_squares(gradient, 0, begin, 0, size, GRAIN, partials, numbers[0])
        for block in range((size + GRAIN - 1) // GRAIN):
            record[COLUMNS + GROUP_COLUMNS * group] += partials[0, block]
    total = 0.0
    for group in range(at[GROUPS]):
        total += record[COLUMNS + GROUP_COLUMNS * group]
    norm = norm_of(total)
    if norm < 0.0:
        return False
    factor = factor_of(norm, numbers[1], at[CLIP])
    record[NORM], record[CLIPPED_NORM], record[COEFFICIENT] = norm, norm * factor, factor
    for group in range(at[GROUPS]):
        first = COLUMNS + GROUP_COLUMNS * group
        own = norm if at[GROUPS] == 1 else norm_of(record[first + GROUP_NORM])
        if own < 0.0:
            return False
        record[first + GROUP_NORM], record[first + GROUP_CLIPPED] = own, own * factor
        record[first + GROUP_COEFFICIENT] = factor
    return True


def finish(at: Any, record: Any, began: float) -> None:
    """Note the times of a step that has changed the state, and write its record into the reply."""
    numbers = carray(pointer(at[NUMBERS]), 3, float64)
    record[BEGAN], record[APPLY], record[PREVIOUS_SEND] = began, now(at) - began, numbers[2]
    values = carray(pointer(at[RECORDS] + 8 * at[RECORD_COLUMNS] * at[ROW]), 8 * at[RECORD_COLUMNS], uint8)
    reply = carray(pointer(at[REPLY]), at[REPLY_LENGTH], uint8)
    doubles = carray(pointer(at[DOUBLES]), (at[DOUBLE_COUNT], 2), int64)
    for index in range(at[DOUBLE_COUNT]):
        source, target = 8 * doubles[index, 0], doubles[index, 1]
        for i in range(8):
            reply[target + i] = values[source + i]
    at[ROW] += 1


def replied(at: Any) -> bool:
    """Send the reply; tell whether the system took it at once."""
    began = now(at)
    done: bool = send(at[FD], at[REPLY], at[REPLY_LENGTH], QUIETLY) == at[REPLY_LENGTH]
    numbers = carray(pointer(at[NUMBERS]), 3, float64)
    numbers[2] = now(at) - began
    records = carray(pointer(at[RECORDS]), (at[ROWS], at[RECORD_COLUMNS]), float64)
    records[at[ROW] - 1, SEND] = numbers[2]
    return done


def advance(at: Any) -> None:
    """Count the numbers in the expected datagram and in the reply up by one; their widths last for the whole grant."""
    counters = carray(pointer(at[COUNTERS]), (at[COUNTER_COUNT], 2), int64)
    for index in range(at[COUNTER_COUNT]):
        digits = carray(pointer(counters[index, 0]), counters[index, 1], uint8)
        for i in range(counters[index, 1]):
            digit = (digits[i] & 0x7F) + 1
            digits[i] = (digits[i] & 0x80) | (digit & 0x7F)
            if digit < 0x80:
                break


def awaited(at: Any, epoll: int, events: int, most: int, moment: float) -> int:
    """Wait for datagrams, awake at first, and return the number of lanes that are ready.

    Args:
        at: the row beyond the last lane's: its clock, and how often waiting awake was in vain.
        epoll: the descriptor of the epoll.
        events: the address of room for `most` events.
        most: the number of lanes.
        moment: the seconds of waiting awake.
    """
    ready: int = 0
    if at[ROW] < SPIN_MISSES:
        end = now(at) + moment
        while now(at) < end:
            ready = epoll_wait(epoll, events, most, 0)
            if ready != 0:
                at[ROW] = 0
                return ready
    at[ROW] += 1
    if at[ROW] == SPIN_MISSES + SPIN_REST:
        at[ROW] = 0
    ready = epoll_wait(epoll, events, most, -1)
    return ready


def run(rows: int, epoll: int, events: int, most: int, moment: float) -> None:
    """Serve lanes until the one beyond the last is ready.

    Args:
        rows: the address of the rows of words.
        epoll: the descriptor of the epoll.
        events: the address of room for `most` events.
        most: the number of lanes; one row more is the loop's own.
        moment: the seconds of waiting awake before the loop sleeps; 0 for none.
    """
    own = carray(pointer(rows + 8 * WIDTH * most), WIDTH, int64)
    own[SELF] = rows + 8 * WIDTH * most
    found = carray(pointer(events), EVENT_WORDS * most, uint32)
    while True:
        ready = awaited(own, epoll, events, most, moment) if moment > 0.0 else epoll_wait(epoll, events, most, -1)
        for index in range(ready):
            lane = int64(found[EVENT_WORDS * index + EVENT_LANE])
            if lane == most:
                return
            serve(rows + 8 * WIDTH * lane, epoll)


LANE_FUNCTIONS: Final[tuple[Callable[..., Any], ...]] = (
    rounded,
    candidates,
    clip_torch,
    clip_optax,
    clip_keras,
    now,
    is_recent,
    is_next,
    record_of,
    norm_of,
    factor_of,
    measured,
    finish,
    replied,
    advance,
    awaited,
)
"""In an order in which each comes after those that it calls; then come the kernel's `stepped`, `serve` and `run`."""
