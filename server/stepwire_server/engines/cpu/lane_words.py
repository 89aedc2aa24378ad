"""The row of words of one compiled lane, `(WIDTH,) int64`: numbers, and the addresses of arrays."""

from __future__ import annotations

import platform
from typing import Final

__all__ = [
    "BUSY",
    "CLIPS",
    "COLUMNS",
    "GROUP_COLUMNS",
    "LANE_CONSTANTS",
    "MOST_ARRAYS",
    "NOT_RECEIVED",
    "OPEN",
    "OVER",
    "WIDTH",
]

OVER: Final = 0
OPEN: Final = 1
BUSY: Final = 2
"""The values of `WORD`; see `numba_lane_functions`."""

NOT_RECEIVED: Final = -1
"""The value of `COUNT` where no datagram is in hand."""

MOST_ARRAYS: Final = 8
"""The most arrays of the state that a kernel steps."""

CLIPS: Final = ("torch", "optax", "keras")
"""The formulas of clipping: `CLIP` is 1 for the first, and 0 for no clipping."""

# The word; the descriptors of the socket and of the bell that wakes the stream's thread; 1, which rings the bell.
WORD, FD, BELL, ONE = 0, 1, 2, 3
# The registration with epoll, two words; the clock, two words; the row's own address.
EVENT, TIME, SELF = 4, 6, 35
# The buffer that datagrams are received into, and the bytes that came; `NOT_RECEIVED` where nothing is in hand.
RECEIVED, CAPACITY, COUNT = 8, 9, 10
# The expected datagram: its head, the bytes of that, and those of head and payload.
EXPECTED, HEAD, LENGTH = 11, 12, 13
# The reply: its bytes, and 1 where it is made and could not be sent.
REPLY, REPLY_LENGTH, UNSENT = 14, 15, 16
# Varints that count up with each step, (n, 2): address, width. Doubles of the reply, (n, 2): column, offset.
COUNTERS, COUNTER_COUNT, DOUBLES, DOUBLE_COUNT = 17, 18, 19, 20
# The steps of the grant: those done, those in all; a record each, (rows, columns) float64.
ROW, ROWS, RECORDS, RECORD_COLUMNS = 21, 22, 23, 24
# The scalars of each step and segment, (rows, segments, n) float64; the segments, (n, 2): start, size.
SCALARS, SEGMENTS, SEGMENT_COUNT = 25, 26, 27
# The ranges whose squares are summed, (n, 3): start, size, group; room for the sums of one range.
RANGES, RANGE_COUNT, PARTIALS, BLOCKS = 28, 29, 30, 31
# The number of groups; the formula of clipping; the sums of telemetry, (segments, n) float64.
GROUPS, CLIP, SUMS = 32, 33, 34
# Float64: the factor of the gradient, the bound of its norm, the seconds of sending the last reply.
NUMBERS: Final = 36
# The gradient; the reply's parameters; the elements of the flat space; the arrays of the state.
GRADIENT, OUT, SIZE, ARRAYS = 37, 38, 39, 40
WIDTH: Final = ARRAYS + MOST_ARRAYS

# The columns of a record: seconds, norms, and the factor of clipping; then so many for each group.
BEGAN, APPLY, SEND, PREVIOUS_SEND, QUEUE, RECEIVE = 0, 1, 2, 3, 4, 5
NORM, CLIPPED_NORM, COEFFICIENT, UPDATE_NORM, PARAM_NORM = 6, 7, 8, 9, 10
COLUMNS: Final = 11
GROUP_NORM, GROUP_CLIPPED, GROUP_COEFFICIENT, GROUP_RATE = 0, 1, 2, 3
GROUP_COLUMNS: Final = 4

# An event of epoll in words of 32 bits, and the one that has the lane: the kernel packs it on one kind of machine.
EVENT_WORDS, EVENT_LANE = (3, 1) if platform.machine() == "x86_64" else (4, 2)

LANE_CONSTANTS: Final = {name: each for name, each in globals().items() if name.isupper() and isinstance(each, int)}
"""By name, for the text of kernels."""
