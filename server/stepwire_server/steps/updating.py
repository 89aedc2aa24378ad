"""One update on its way through the state: a range at a time, each answered in the pass that steps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stepwire_server.engines.protocol import PARAM, EngineState, Gradient, HostArray, Pending
from stepwire_server.steps.update import SegmentPass, between

__all__ = ["Update"]


class Update:
    """The arithmetic of one update, and the sums that its passes return."""

    def __init__(self, state: EngineState, runs: Sequence[SegmentPass], group_count: int) -> None:
        """Step `runs` of `state`; what no run covers stays as it is."""
        self._state = state
        self._runs = runs
        self._sums: list[list[Pending[tuple[float, ...]]]] = [[] for _ in range(group_count)]

    def step(
        self, gradient: Gradient | None, offset: int, start: int, end: int, out: HostArray | None
    ) -> list[Pending[Any]]:
        """Update flat elements `[start, end)`, and encode them into `out`.

        Args:
            gradient: a chunk; None where nothing was sent: then the range is answered as it is.
            offset: the chunk's first flat element.
            start: first flat element.
            end: one past the last.
            out: `(end - start,)`; None for no answer.

        Returns:
            What `out` waits for.
        """
        if gradient is None:
            return self.answer(start, end, start, out)
        done = start
        work: list[Pending[Any]] = []
        for first, last, group, step in between(self._runs, start, end):
            low, high = max(first, start), min(last, end)
            if done < low:
                work += self.answer(done, low, start, out)
            target = None if out is None else out[low - start : high - start]
            moved = self._state.update(step, low, gradient, low - offset, high - offset, target)
            self._sums[group].append(moved)
            work.append(moved)
            done = high
        if done < end:
            work += self.answer(done, end, start, out)
        return work

    def answer(self, low: int, high: int, start: int, out: HostArray | None) -> list[Pending[Any]]:
        """Encode flat elements `[low, high)` as they are into `out`, which begins at `start`."""
        if out is None or low == high:
            return []
        return [self._state.read(PARAM, low, out[low - start : high - start])]

    def norms(self) -> list[list[float]]:
        """Return for each group the roots of what its passes summed, in the order of `Recipe.sums`; [] for none."""
        moved = [[asked.wait() for asked in group] for group in self._sums]
        return [[math.sqrt(math.fsum(column)) for column in zip(*group, strict=True)] for group in moved]
