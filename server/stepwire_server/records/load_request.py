"""A load as its first message asks for it, in the domain's own terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stepwire.wire.dtypes import FLOAT32
from stepwire_server.rules.loss_scale import LossScale

__all__ = ["LoadRequest"]


class LoadRequest(NamedTuple):
    """A load of whole slots, or of some rows of tables.

    Attributes:
        load: the number it will have once committed.
        slots: the names of the slots that are replaced.
        dtype: the encoding of the chunks.
        epoch: the epoch the client knows; 0 skips the check.
        step: the session's new applied step; None leaves it.
        place: a place in an accumulation, and its length: the step rises to the next number at that place.
        tensor_steps: the updates that each tensor has had, in layout order; empty leaves them.
        loss_scale: the new state of loss scaling; None leaves it.
        tensor_scalars: the scalar of each tensor, in layout order. Empty leaves them, or beside `tensor_steps` derives
            them from these and the session's numbers.
        sum_bound: no element of an accumulated gradient among the slots is larger in magnitude; None if that is not
            known.
        by_rows: it brings parameters of some rows of tables, and not whole slots.
        tables: these tables, by index, each with its number of rows.
    """

    load: int
    slots: tuple[str, ...]
    dtype: np.dtype[Any] = FLOAT32
    epoch: int = 0
    step: int | None = None
    tensor_steps: tuple[int, ...] = ()
    loss_scale: LossScale | None = None
    tensor_scalars: tuple[float, ...] = ()
    sum_bound: float | None = None
    by_rows: bool = False
    tables: tuple[tuple[int, int], ...] = ()
    place: tuple[int, int] | None = None

    def placed(self, applied_step: int) -> LoadRequest:
        """Return the request with the number of its step, for a session that is at a step."""
        if self.place is None:
            return self
        (place, length), least = self.place, applied_step if self.step is None else self.step
        return self._replace(step=least + (place - least) % length, place=None)
