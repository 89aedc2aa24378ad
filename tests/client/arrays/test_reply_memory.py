"""The memory of replies is written again once the last array that shows it is gone, and never before."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.arrays.reply_memory import ReplyMemory

SIZE = (1 << 20) // 4  # float32 elements of the smallest memory that is kept
FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def memory() -> ReplyMemory:
    return ReplyMemory()


def address(array: np.ndarray[Any, Any]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def test_a_program_that_holds_one_reply_gets_two_memories_by_turns(memory: ReplyMemory) -> None:
    reply, seen = memory.empty(SIZE, FLOAT32), []
    for _ in range(5):
        seen.append(address(reply))
        reply = memory.empty(SIZE, FLOAT32)  # the one before is let go of when this one is there
    assert seen == [seen[0], seen[1]] * 2 + [seen[0]]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "kept",
    [
        lambda reply: reply,
        lambda reply: reply[5:6],
        lambda reply: reply[::2].reshape(2, -1).T,
        lambda reply: reply.view(np.uint8)[-1:],
        lambda reply: memoryview(reply)[3:4],
        lambda reply: np.frombuffer(reply, np.float32, 1),
    ],
    ids=["all", "a slice", "a view of views", "other items", "a memoryview", "a buffer"],
)
def test_memory_that_anything_shows_stays_as_it_is(memory: ReplyMemory, kept: Any) -> None:
    first = memory.empty(SIZE, FLOAT32)
    first[:] = 1.0
    shown = kept(first)
    before = np.array(shown, copy=True)
    del first
    for _ in range(4):
        memory.empty(SIZE, FLOAT32)[:] = 2.0
    np.testing.assert_array_equal(np.asarray(shown), before)


def test_replies_that_are_kept_are_each_of_their_own(memory: ReplyMemory) -> None:
    kept = [memory.empty(SIZE, FLOAT32) for _ in range(4)]
    assert len(set(map(address, kept))) == 4
    assert len(memory._known) == 2  # the others belong to their arrays alone


def test_what_a_user_writes_is_gone_with_the_array(memory: ReplyMemory) -> None:
    first = memory.empty(SIZE, FLOAT32)
    assert first.flags.writeable
    first[:] = np.nan
    del first
    second = memory.empty(SIZE, FLOAT32)
    second[:] = 3.0
    assert float(second.sum()) == 3.0 * SIZE


def test_another_dtype_has_the_memory_only_if_its_bytes_are_as_many(memory: ReplyMemory) -> None:
    first = memory.empty(SIZE, FLOAT32)
    at = address(first)
    del first
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert address(memory.empty(2 * SIZE, bfloat16)) == at
    wider = memory.empty(4 * SIZE, bfloat16)
    assert (wider.dtype, wider.shape, address(wider) != at) == (bfloat16, (4 * SIZE,), True)


def test_small_replies_are_plain_arrays(memory: ReplyMemory) -> None:
    reply = memory.empty(SIZE - 1, FLOAT32)
    assert (reply.flags.owndata, reply.shape, memory._known) == (True, (SIZE - 1,), [])
