"""The places that the tests of interrupts try: some, or every one with `make interrupts`."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

__all__ = ["chosen"]

_EVERY = "STEPWIRE_INTERRUPTS" in os.environ
_SOME = 3


def chosen(count: int, seed: str) -> Sequence[int]:
    """Return the numbers of the places that are tried, of `count` ones."""
    assert count > 0
    numbers = range(count)
    return numbers if _EVERY else random.Random(seed).sample(numbers, min(_SOME, count))
