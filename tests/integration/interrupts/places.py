"""The places that the tests of interrupts try: some, or every one with `make interrupts`."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence

import pytest

__all__ = ["chosen"]

_EVERY = "STEPWIRE_INTERRUPTS" in os.environ
_SOME = 6


def chosen(count: int, seed: str) -> Sequence[int]:
    """Return the numbers of the places that are tried, of `count` ones."""
    if sys.version_info >= (3, 13) and not count:
        pytest.skip("the places where an interrupt arrives are known of CPython up to 3.12")
    assert count > 0
    numbers = range(count)
    return numbers if _EVERY else random.Random(seed).sample(numbers, min(_SOME, count))
