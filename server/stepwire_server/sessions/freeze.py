"""The rest of a session for the time of a move: no step beyond one number is admitted, no load, and no new worker.

Of several workers each has a number of its own: that of its last contribution that is admitted.

A freeze is in memory alone, and ends by itself. So a mover that is gone stops nobody for long, and a server that was
restarted has forgotten it. The end of a move asks for the freeze once more, and so finds out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple

from stepwire.errors import Reason, UnavailableError

__all__ = ["Freeze", "Frozen", "Rest"]

_RETRY_SECONDS: Final = 0.05


class Frozen(NamedTuple):
    """A frozen session.

    Attributes:
        applied_step: its last committed step.
        last_step: the last step that is admitted.
        applied_load: its last committed load.
        epoch: its epoch.
        contributions: of several workers, those that have joined, with their last contributions.
        last_contributions: of several workers, the last contributions that are admitted.
        begin_anew: of several workers, those whose last contributions a load has come behind.
    """

    applied_step: int
    last_step: int
    applied_load: int
    epoch: int
    contributions: Mapping[int, int] = {}
    last_contributions: Mapping[int, int] = {}
    begin_anew: Collection[int] = ()


class Rest(NamedTuple):
    """The moment at which a session rests, as its mover knows it.

    Attributes:
        move_id: the name of the move.
        step: the last step.
        load: the last load.
        epoch: the epoch.
        contributions: of several workers, the last contribution of each.
    """

    move_id: str
    step: int
    load: int
    epoch: int
    contributions: Mapping[int, int] = {}


class Freeze:
    """One freeze.

    Attributes:
        move_id: the name of the move.
        last_step: the last step that is admitted.
        last_contributions: of several workers, the last contribution of each that is admitted.
        present: of several workers, those that are present, or were at the beginning.
    """

    def __init__(
        self,
        move_id: str,
        last_step: int,
        seconds: float,
        clock: Callable[[], float],
        last_contributions: Mapping[int, int] | None = None,
        present: Collection[int] = (),
    ) -> None:
        """Freeze for some seconds of a clock."""
        self.move_id = move_id
        self.last_step = last_step
        self.last_contributions = dict(last_contributions or {})
        self.present = frozenset(present)
        self._clock = clock
        self._end = clock() + seconds

    @property
    def is_lasting(self) -> bool:
        """The record of a successor may be on the disk: the session rests until its mover asks for that again."""
        return self._end == math.inf

    @property
    def is_over(self) -> bool:
        """The session goes on: the mover has not renewed the freeze."""
        return self._clock() >= self._end

    def check_step(self, step: int) -> None:
        """Refuse a step beyond the last one.

        Raises:
            UnavailableError: SESSION_MOVING.
        """
        if step > self.last_step and not self.is_over:
            raise _moving("step", step, f"is admitted no step beyond {self.last_step}")

    def check_contribution(self, worker: int, number: int) -> None:
        """Refuse a contribution beyond the last one of its worker.

        Raises:
            UnavailableError: SESSION_MOVING.
        """
        last = self.last_contributions.get(worker, 0)
        if number > last and not self.is_over:
            raise _moving("contribution", number, f"is admitted none of worker {worker} beyond {last}")

    def check_worker(self, worker: int) -> None:
        """Refuse a worker that has not joined before, unless the freeze names it.

        Raises:
            UnavailableError: SESSION_MOVING.
        """
        if worker not in self.last_contributions and not self.is_over:
            raise _moving("worker", worker, "is joined by no other worker")

    def check_attach(self) -> None:
        """Refuse a stream while the record of a successor is being kept: it tells the holds of the end.

        Raises:
            UnavailableError: SESSION_MOVING.
        """
        if self.is_lasting:
            raise _moving("attach", 0, "is joined by no stream")

    def check_load(self, load: int) -> None:
        """Refuse a load.

        Raises:
            UnavailableError: SESSION_MOVING.
        """
        if not self.is_over:
            raise _moving("load", load, "is admitted no load")


def _moving(what: str, number: int, bound: str) -> UnavailableError:
    return UnavailableError(
        f"{what} {number}: the session is moving to other servers, and {bound}; nothing was applied, try again",
        reason=Reason.SESSION_MOVING,
        metadata={what: number},
        retry_after_seconds=_RETRY_SECONDS,
    )
