"""The guard of memory: free bytes are given back first, and then parts of messages are given up."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire_server.host.memory_guard import MemoryGuard

MIB = 1 << 20


class Memory:
    """The memory of a process.

    Attributes:
        used: the bytes that are allocated.
        free: the bytes that are resident and free.
        trimmed: how often free bytes were given back.
        asked: how often memory was asked to be given up.
    """

    def __init__(self) -> None:
        self.used = self.free = self.trimmed = self.asked = 0

    def guard(self, limit: int) -> MemoryGuard:
        return MemoryGuard(self.relieve, limit, resident=self.resident, free=lambda: self.free, trim=self.trim)

    def resident(self) -> int:
        return self.used + self.free

    def trim(self) -> None:
        self.trimmed, self.free = self.trimmed + 1, 0

    def relieve(self) -> int:
        self.asked += 1
        return 1


@pytest.mark.parametrize(
    ("used", "free", "trimmed", "asked"),
    [(890, 10, 0, 0), (890, 11, 0, 0), (500, 401, 1, 0), (901, 0, 0, 1), (901, 40, 1, 1)],
    ids=["nine tenths", "little is free", "much is free", "all is used", "both"],
)
def test_memory_is_given_up_from_nine_tenths_of_the_limit_on(used: int, free: int, trimmed: int, asked: int) -> None:
    memory: Any = Memory()
    guard = memory.guard(1000 * MIB)
    memory.used, memory.free = used * MIB, free * MIB
    guard.look()
    assert (memory.trimmed, memory.asked) == (trimmed, asked)


def test_what_trimming_leaves_is_not_trimmed_again() -> None:
    memory = Memory()
    memory.trim = lambda: setattr(memory, "trimmed", memory.trimmed + 1)  # type: ignore[method-assign]
    guard = memory.guard(1000 * MIB)
    memory.used, memory.free = 500 * MIB, 401 * MIB
    for _ in range(3):
        guard.look()
    assert (memory.trimmed, memory.asked) == (1, 0)


def test_closing_twice_is_harmless() -> None:
    guard = Memory().guard(1000 * MIB)
    guard.start()
    guard.close()
    guard.close()
