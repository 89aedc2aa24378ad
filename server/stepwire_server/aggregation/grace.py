"""The grace for stragglers, learnt from arrivals.

A fixed time is wrong both ways: it ends rounds before workers of a usual pace, or waits long for a dead one. So the
grace is median + 3 MAD of the times at which gradients arrived after the first one of their round. The gradients that
came too late are among them: when half of the workers are slow, the grace grows until they are in time.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

__all__ = ["Grace"]

_DEVIATIONS: Final = 3.0
_ROUNDS: Final = 16


class Grace:
    """The grace of one session's rounds. The session serialises its calls."""

    def __init__(self, workers: int, least: float, most: float) -> None:
        """Start without arrivals, with the longest grace.

        Args:
            workers: the number of workers; about as many arrivals make a round.
            least: the shortest grace, in seconds.
            most: the longest.
        """
        self._least = least
        self._most = most
        self._known = max(workers - 1, 1)
        self._arrivals: deque[float] = deque(maxlen=_ROUNDS * self._known)

    def arrived(self, seconds: float) -> None:
        """Note an arrival, in seconds after the first one of its round."""
        self._arrivals.append(max(seconds, 0.0))

    def seconds(self) -> float:
        """Return the grace from the first arrival of a round on."""
        if len(self._arrivals) < self._known:
            return self._most
        median = statistics.median(self._arrivals)
        deviation = statistics.median([abs(seconds - median) for seconds in self._arrivals])
        return min(max(median + _DEVIATIONS * deviation, self._least), self._most)
