"""Arrays that come back step after step, or others of their form: checked once, and recognised after that.

To check the names, dtypes and shapes of ten arrays costs more than to copy them, where they are small. A training
program passes the same arrays again, or new ones that differ from them in their elements alone.

Arrays of the form of others that were checked would pass the same checks. The form is everything that the checks look
at: names, types, shapes, strides, dtypes and, where arrays are written, their permission. Small arrays are recognised
by identity too, so that what else is known of them, such as where they lie, need not be found out again. No array is
kept alive by it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["FITTING", "ArrayForm", "RecognisedArrays"]

_MOST_BYTES: Final = 64 << 10
_LEAST_BYTES: Final = 2
"""The bytes of an element at least."""

_REPEATS: Final = 3
"""The calls in a row whose arrays seem to be the same, before it costs less to know them by identity."""

FITTING: Final = object()
"""Stands for arrays that are recognised by their form, and not by identity."""

_TYPES: Final = {np.ndarray}
_form: Final = operator.attrgetter("shape", "strides", "dtype")
_Flat = list[npt.NDArray[Any]]


class ArrayForm(NamedTuple):
    """The properties of a dict of arrays that its checks look at.

    Attributes:
        names: the names, in the dict's order.
        arrays: the shape, the strides and the dtype of each array.
    """

    names: list[str]
    arrays: list[tuple[Any, ...]]


class RecognisedArrays:
    """The arrays of the last call in one place of it. The session serialises its calls.

    A handler of a signal may call the session in the middle, with other arrays. So what belongs together is stored and
    read without a call in between, where no handler arrives.

    Attributes:
        form: the form of the arrays that were checked last; None if it is not known.
    """

    def __init__(self, order: tuple[str, ...], elements: int, *, written: bool) -> None:
        """Recognise nothing yet.

        Args:
            order: the names of all tensors in layout order.
            elements: the elements of all tensors; if they are many, no call looks for small arrays.
            written: the arrays are written, so they have to stay writable.
        """
        self._order = list(order)
        self._written = written
        self._is_small = elements * _LEAST_BYTES <= _MOST_BYTES
        self.form: ArrayForm | None = None
        self._mark: object | None = None
        self._identities: list[int] = []
        self._dead: list[object] = []
        self._alive: list[object] = []
        self._repeats = 0

    def knows(self, arrays: object) -> object | None:
        """Return the mark of arrays that are those of the last call, and would pass its checks; None for others.

        A mark stands for these very arrays, and whatever is known of them beyond the checks.
        """
        if self._mark is None or (mark := self._found(arrays)) is FITTING:
            return None
        return mark

    def recalls(self, arrays: Any) -> object | None:
        """Return the mark of arrays as `knows` does, `FITTING` for others that would pass the checks, None for others.

        The caller uses `again` for those that are recognised.
        """
        if (mark := self._found(arrays)) is not FITTING:
            return mark
        identities = list(map(id, arrays.values()))
        repeats = self._repeats + 1 if identities == self._identities else 0
        self._mark, self._identities, self._dead, self._alive, self._repeats = None, identities, [], [], repeats
        if repeats >= _REPEATS:
            self._know(arrays)
        return FITTING

    def views(self, arrays: object, checked: Callable[[], _Flat]) -> _Flat:
        """Return 1-D views of arrays in layout order.

        Args:
            arrays: the user's arrays.
            checked: checks them, and returns their views; it raises if something is wrong.
        """
        if self.recalls(arrays) is not None:
            return self.again(arrays)
        self._mark, self.form, self._identities, self._dead, self._alive, self._repeats = None, None, [], [], [], 0
        flat = checked()
        if type(arrays) is dict and len(arrays) == len(self._order) and all(map(_is_simple, arrays.values())):
            self.form = ArrayForm(list(arrays), list(map(_form, arrays.values())))
            self._know(arrays)
        return flat

    def again(self, arrays: Any) -> _Flat:
        """Return 1-D views in layout order of arrays that are recognised."""
        values = arrays.values() if list(arrays) == self._order else map(arrays.__getitem__, self._order)
        return list(map(np.ndarray.ravel, values))  # views: the arrays are contiguous

    def _found(self, arrays: object) -> object | None:
        """Return the mark of arrays, `FITTING` for others of the form of those that were checked, None for others."""
        mark, form = self._mark, self.form
        if form is None or type(arrays) is not dict or list(arrays) != form.names:
            return None
        values = arrays.values()
        if mark is not None and (self._dead or list(map(id, values)) != self._identities):
            mark = None
        if mark is None and set(map(type, values)) != _TYPES or list(map(_form, values)) != form.arrays:
            return None
        if self._written and not all([array.flags.writeable for array in values]):
            return None
        return FITTING if mark is None or mark is not self._mark else mark

    def _know(self, arrays: dict[str, Any]) -> None:
        """Know small arrays by identity: it is that of another array once its own is gone, which the dead tell."""
        if not self._is_small or sum([array.nbytes for array in arrays.values()]) > _MOST_BYTES:
            return
        identities, dead = list(map(id, arrays.values())), list[object]()
        mark, alive = object(), list[object](weakref.ref(array, dead.append) for array in arrays.values())
        self._identities, self._dead, self._alive, self._mark = identities, dead, alive, mark


def _is_simple(array: object) -> bool:
    """Tell whether an array is NumPy's own and contiguous, so that a view of it costs little."""
    return type(array) is np.ndarray and array.flags.c_contiguous
