"""The arrays of a reply: ranges of one flat array, all made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import numpy.typing as npt

__all__ = ["MadeReply", "Ranges"]

MadeReply: TypeAlias = tuple[npt.NDArray[Any], Any]
"""A flat array, `(size,)`, and the container of the user's arrays, which are views of it."""


class Ranges(Sequence[Any]):
    """1-D ranges of one flat array, in layout order.

    The array is made while the server is at work, and a range of it when it is asked for. A reply that is read in one
    piece needs no range, and a reply that lies in shared memory no array.

    A handler of a signal may come in the middle, and bring the step to its end with arrays that it makes itself. Then
    those are the arrays, since they have been read.
    """

    __slots__ = ("_bounds", "_made", "_make")

    def __init__(self, make: Callable[[], MadeReply], bounds: Sequence[slice]) -> None:
        """Show ranges of the array that `make` makes."""
        self._make = make
        self._bounds = bounds
        self._made: MadeReply | None = None

    @property
    def whole(self) -> npt.NDArray[Any]:
        """The flat array, `(size,)`."""
        return self.made()[0]

    @property
    def container(self) -> Any:
        """The user's arrays, in the container that the user gets."""
        return self.made()[1]

    def made(self) -> MadeReply:
        """Return the flat array and its container, and make them the first time."""
        if self._made is None:
            made = self._make()
            if self._made is None:  # nothing arrives between this look and the store
                self._made = made
        return self._made

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._bounds)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[npt.NDArray[Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return a range, or a list of some."""
        if isinstance(index, slice):
            return [self.whole[bounds] for bounds in self._bounds[index]]
        return self.whole[self._bounds[index]]
