"""The faults of a history: chosen from a seed, printed, and shrunk to those that matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

__all__ = ["KINDS", "Fault", "chosen", "shrunk"]

_F = TypeVar("_F")

KINDS: Final = ("cut", "hold", "slow", "twice", "kill", "power", "pause", "replace", "overtake", "stale")
"""The faults of a shard.

cut: its connections break. hold: it is partitioned. slow: its messages take long, and overtake one another. twice: its
next unary call arrives twice. kill: its process ends at some call of the disk. power: its machine loses power there.
pause: its process stands still. replace: it stands still, a new owner comes, and it goes on. overtake: a new owner
comes while it works. stale: new calls reach its oldest process that lives.
"""


class Fault(NamedTuple):
    """One fault.

    Attributes:
        at: the virtual second.
        kind: see `KINDS`.
        shard: the shard.
        seconds: how long it lasts, or until a new process comes.
        calls: the calls of the disk until it happens, for those that wait for one.
    """

    at: float
    kind: str
    shard: int
    seconds: float
    calls: int


def chosen(chance: random.Random, shards: int, most: int, until: float) -> list[Fault]:
    """Choose up to so many faults within a time."""
    count = chance.randint(0, most)
    return sorted(
        Fault(
            at=round(chance.uniform(0.0, until), 4),
            kind=chance.choice(KINDS),
            shard=chance.randrange(shards),
            seconds=round(chance.choice((0.05, 0.5, 3.0, 8.0)) * chance.uniform(0.2, 1.0), 3),
            calls=chance.randint(1, 40),
        )
        for _ in range(count)
    )


def shrunk(faults: Sequence[_F], fails: Callable[[Sequence[_F]], bool]) -> list[_F]:
    """Return a part of the faults that still fails, and of which no single fault can be left out."""
    found, left_out = list(faults), True
    while left_out:
        left_out = False
        for index in reversed(range(len(found))):
            fewer = found[:index] + found[index + 1 :]
            if fails(fewer):
                found, left_out = fewer, True
    return found
