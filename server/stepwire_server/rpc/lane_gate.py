"""The gate of a server's compiled lanes: it closes when the server drains, so that Python refuses every later step."""

from __future__ import annotations

import threading

from stepwire_server.engines.cpu.lane_loop import Seat

__all__ = ["LaneGate"]


class LaneGate:
    """The compiled lanes of a server. Thread-safe.

    Attributes:
        after_steps: the steps alike on a stream after which a loop is compiled for them, if there is none.
    """

    def __init__(self, *, after_steps: int = 64, enabled: bool = True) -> None:
        """Grant steps to lanes until `close`, or never."""
        self.after_steps = after_steps
        self._open = enabled
        self._seats: set[Seat] = set()
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Steps are granted to lanes."""
        return self._open

    def grant(self, seat: Seat) -> bool:
        """Begin a grant; False once the gate is closed."""
        with self._lock:
            if self._open:
                self._seats.add(seat)
                seat.grant()
            return self._open

    def over(self, seat: Seat) -> None:
        """Note that a grant has ended."""
        with self._lock:
            self._seats.discard(seat)

    def close(self) -> None:
        """End all grants, and begin none any more: from now on Python admits or refuses every step."""
        with self._lock:
            self._open = False
            for seat in self._seats:
                seat.end()
