"""The gate of a server's compiled lanes: it closes when the server drains, so that Python refuses every later step."""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

from stepwire_server.engines.cpu.lane_loop import Seat

__all__ = ["AFTER_STEPS", "LaneGate", "LaneStatistics"]

AFTER_STEPS: Final = 256
"""The steps alike on a stream before a loop is compiled for it: that costs seconds where no cache has it."""

_FIRST_LOOK: Final = 8


class LaneStatistics(NamedTuple):
    """The state of the compiled lanes of a server.

    Attributes:
        granted: the streams whose next steps are granted to a loop.
        steps: the steps that loops have made, as far as their sessions were told of them.
    """

    granted: int
    steps: int


class LaneGate:
    """The compiled lanes of a server. Thread-safe.

    Attributes:
        after_steps: the steps alike on a stream before a loop is compiled for it.
        steps_alike: the steps alike before each later one: whoever pulls after each step has no use for a grant.
    """

    def __init__(self, *, after_steps: int = AFTER_STEPS, steps_alike: int = 2, enabled: bool = True) -> None:
        """Grant steps to lanes until `close`, or never."""
        self.after_steps, self.steps_alike = after_steps, steps_alike
        self._open = enabled
        self._seats: set[Seat] = set()
        self._steps = 0
        self._lock = threading.Lock()

    @property
    def first_look(self) -> int:
        """The steps alike on a new stream before a loop is looked for that others had compiled."""
        return min(_FIRST_LOOK, self.after_steps)

    @property
    def is_open(self) -> bool:
        """Steps are granted to lanes."""
        return self._open

    def grant(self, seat: Seat) -> bool:
        """Begin a grant; False once the gate is closed.

        Raises:
            OSError: the system refuses it; nothing is granted.
        """
        with self._lock:
            if self._open:
                seat.grant()
                self._seats.add(seat)
            return self._open

    def over(self, seat: Seat) -> None:
        """Note that a grant has ended."""
        with self._lock:
            self._seats.discard(seat)

    def count(self) -> None:
        """Count a step that a loop has made."""
        with self._lock:
            self._steps += 1

    def statistics(self) -> LaneStatistics:
        """Return the state as of now."""
        with self._lock:
            return LaneStatistics(len(self._seats), self._steps)

    def close(self) -> None:
        """End all grants, and begin none any more: from now on Python admits or refuses every step."""
        with self._lock:
            self._open = False
            for seat in self._seats:
                seat.end()
