"""The parameters as the program has them, and the session that follows them. NumPy alone.

A program may change its parameters between two updates: by a projection, by a transformation behind the update, by
values from a checkpoint. The update after it starts from the changed values, as with optax alone. So each step compares
the program's parameters with those that the step before it left in the program, and sends them if they differ.

After `tx.step` the program has the parameters of the reply. After `update` it has p + (new - p), which
`optax.apply_updates` computes in float32, and which differs from `new` where the difference was rounded. This module
computes the same sum with the same roundings, so the comparison needs no tolerance. One exception is left: XLA may
flush numbers below 2^-126 to zero, on the way to the sum too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.session import Session
from stepwire.wire.dtypes import FLOAT32

__all__ = ["FLUSHED", "ProgramParameters", "after_update", "is_same", "masters"]

_Array = npt.NDArray[Any]

_BLOCK: Final = 1 << 16
"""The elements that are computed at a time, so that temporary values stay in the processor's cache."""

FLUSHED: Final = 2.0**-124
"""A bound of the differences that flushing makes: of three numbers below 2^-126, and of the roundings of their sum."""


class ProgramParameters:
    """The parameters of one session in its program. Not thread-safe.

    Attributes:
        names: the names of the tensors, in the order of the leaves of the parameters.
    """

    def __init__(self, session: Session, names: Sequence[str], values: Sequence[_Array] | None) -> None:
        """Start with the values that the program has, in the order of the names, and keep them; None if unknown."""
        self.names = tuple(names)
        self._session = session
        self._values = values

    def upload_changes(self, given: Sequence[_Array], reply_dtype: npt.DTypeLike) -> bool:
        """Make the session's parameters the program's, if other code has changed them since the last reply.

        Where the program's value is the rounding of the session's float32 value, the latter stays.

        Args:
            given: the parameters that the program has now.
            reply_dtype: the dtype in which parameters travel to the program.

        Returns:
            True if parameters were sent.

        Raises:
            StepwireError: as `Session.load`. The next call sends the parameters again.
        """
        if self._values is not None and all(map(is_same, given, self._values)):
            return False
        self._values = None
        self._session.load(self._masters(given, reply_dtype))
        self._values = [np.array(array) for array in given]
        return True

    def stepped(self, before: Sequence[_Array], reply: Sequence[_Array], *, exact: bool) -> None:
        """Note the parameters that a step leaves in the program.

        Args:
            before: the parameters before the step.
            reply: the parameters that the step returned.
            exact: True if the program gets the reply itself, and not its difference from the parameters.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            self._values = [
                new.astype(old.dtype) if exact else after_update(old, new)
                for old, new in zip(before, reply, strict=True)
            ]

    def _masters(self, given: Sequence[_Array], reply_dtype: npt.DTypeLike) -> dict[str, _Array]:
        """Return the float32 values of the program's parameters, by name."""
        named = dict(zip(self.names, given, strict=True))
        if reply_dtype == FLOAT32 and all(array.dtype == FLOAT32 for array in given):
            return named
        held: Any = self._session.pull()
        return masters(held, named, reply_dtype)


def masters(held: Mapping[str, _Array], given: Mapping[str, _Array], reply_dtype: npt.DTypeLike) -> dict[str, _Array]:
    """Return float32 values: `held` where they round to the program's parameters, and the program's elsewhere.

    Args:
        held: the float32 values of a session or a checkpoint, by name.
        given: the parameters of the program, by name.
        reply_dtype: the dtype in which parameters travel to the program.
    """
    return {name: _merged(held[name], array, reply_dtype) for name, array in given.items()}


def after_update(old: _Array, new: _Array) -> _Array:
    """Return the parameters after `optax.apply_updates`: old + (new - old) in float32, in the dtype of `old`."""
    after = np.empty(old.shape, old.dtype)
    flat_old, flat_new, flat_after = old.reshape(-1), new.reshape(-1), after.reshape(-1)
    for start in range(0, old.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        before = flat_old[block].astype(np.float32, copy=False)
        difference = flat_new[block].astype(np.float32, copy=False) - before
        flat_after[block] = np.add(before, difference, out=difference)
    return after


def is_same(given: _Array, expected: _Array) -> bool:
    """Tell whether the program's values are those that its last step left there."""
    if given.shape != expected.shape:
        return False
    flat_given, flat_expected = given.reshape(-1), expected.reshape(-1)
    return all(
        _is_same_block(flat_given[start : start + _BLOCK], flat_expected[start : start + _BLOCK])
        for start in range(0, given.size, _BLOCK)
    )


def _is_same_block(given: _Array, expected: _Array) -> bool:
    bits = f"u{given.dtype.itemsize}"
    if given.dtype == expected.dtype and np.array_equal(given.view(bits), expected.view(bits)):
        return True
    return bool(_same_values(given, expected).all())


def _same_values(given: _Array, expected: _Array) -> npt.NDArray[np.bool_]:
    one, other = given.astype(np.float32), expected.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        close = np.abs(one - other) <= FLUSHED
    same: npt.NDArray[np.bool_] = close | (one == other) | (np.isnan(one) & np.isnan(other))
    return same


def _merged(held: _Array, given: _Array, reply_dtype: npt.DTypeLike) -> _Array:
    with np.errstate(over="ignore", invalid="ignore"):
        shown = held.astype(reply_dtype).astype(given.dtype)
        merged: _Array = np.where(_same_values(given, shown), held, given.astype(np.float32))
    return merged
