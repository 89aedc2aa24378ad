"""The choice of the steps that are traced: one in N, and those that are slower than almost all before them."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Final

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import whole_number

__all__ = ["StepSampling", "check_one_in"]

_RECENT: Final = 1000
_LOOK: Final = 100
_MOST: Final = 1 << 53


class StepSampling:
    """The choice among the steps of one session. Thread-safe.

    A step is slow if it takes longer than 99 % of the last thousand. That bound is computed once in a hundred steps. So
    a step costs a comparison, and the first hundred are never slow.
    """

    def __init__(self, one_in: int) -> None:
        """Choose the first of every `one_in` steps, and slow ones."""
        self._one_in = one_in
        self._begun, self._ended = itertools.count(), itertools.count(1)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._bound = float("inf")

    def is_chosen(self) -> bool:
        """Tell whether the step that begins now is one in N."""
        return next(self._begun) % self._one_in == 0

    def is_slow(self, seconds: float) -> bool:
        """Tell whether a step that has ended was slow, and remember its time."""
        slow = seconds > self._bound
        self._recent.append(seconds)
        if next(self._ended) % _LOOK == 0:
            ordered = sorted(self._recent)
            self._bound = ordered[-1 - len(ordered) // 100]
        return slow


def check_one_in(one_in: int, field: str) -> int:
    """Return a number of steps of which one is traced; 0 for no traces.

    Raises:
        InvalidRequestError: it is no whole number, or negative.
    """
    if not 0 <= (number := whole_number(one_in, field)) < _MOST:
        raise InvalidRequestError.of(field, f"{one_in!r:.80} is not in [0, 2^53); 0 stands for no traces")
    return number
