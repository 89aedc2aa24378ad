"""The life of an optimizer: until its end, in the process that made it."""

from __future__ import annotations

from stepwire.errors import InvalidRequestError
from stepwire.lifetimes.forks import Birthplace

__all__ = ["Life"]


class Life:
    """The time and the process in which an optimizer can be used.

    Attributes:
        closed: True after `close` or `detach`.
    """

    def __init__(self) -> None:
        """Begin here and now."""
        self.closed = False
        self._birthplace = Birthplace()

    @property
    def is_over(self) -> bool:
        """Tell whether the optimizer is closed, or is that of the parent of this forked child."""
        return self.closed or not self._birthplace.is_here

    def check(self) -> None:
        """Refuse a call after the end, or in a forked child.

        Raises:
            InvalidRequestError: `close` or `detach` was called, or this is a child.
        """
        self._birthplace.check(
            "optimizer",
            "both would step one session. Make an optimizer in the child, for a model of its own. Several processes "
            "that step one model in shared memory (Hogwild) are not served: give each a model of its own, and make "
            "them workers of one job (worker=, workers=, job=)",
        )
        if self.closed:
            raise InvalidRequestError.of(
                "optimizer", "the optimizer is closed; make a new one, with session=… if its session was left there"
            )
