"""A run of tests that has so many seconds: the tests that come too late are skipped, each by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import pytest

__all__ = ["TimeLeft"]


class TimeLeft:
    """The seconds of a run, from now on: `STEPWIRE_GPU_SECONDS`, or any number without the variable."""

    def __init__(self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = float(environ.get("STEPWIRE_GPU_SECONDS", "inf"))
        self._clock = clock
        self._end = clock() + self._seconds

    def require(self, name: str) -> None:
        """Skip a test for which there is no time."""
        if self._clock() > self._end:
            pytest.skip(f"left out, {self._seconds:.0f} seconds were over: {name}")
