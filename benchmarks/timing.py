"""The times of an action that is made again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["times_of"]


def times_of(action: Callable[[], Any], count: int) -> list[float]:
    """Return the seconds of each of so many actions."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times
