"""Copies between a user's arrays and shared memory, by several threads where they are large.

One thread copies about half as fast as the memory of a small machine can. The server waits meanwhile, so its cores are
free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.connection.errands import together
from stepwire.wire.dtypes import FLOAT16

__all__ = ["Copy", "are_few", "copy_all"]

Copy: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""A 1-D array that is written, and one of as many elements that is read."""

_LEAST_BYTES: Final = 4 << 20
"""The bytes that a thread copies at least: fewer are copied before another thread is awake."""

_MOST_THREADS: Final = 4
"""Further threads find the memory busy."""


def are_few(nbytes: int) -> bool:
    """Tell whether one thread copies so many bytes."""
    return nbytes < 2 * _LEAST_BYTES


def copy_all(copies: Sequence[Copy]) -> None:
    """Copy arrays, none of which lies in memory that another copy writes.

    A value beyond float16 becomes infinite, as `Packer.write` documents, without a warning.

    Args:
        copies: the copies; the dtypes may differ.
    """
    nbytes = sum([place.nbytes for place, _ in copies])
    threads = 1
    if not are_few(nbytes):
        threads = min(nbytes // _LEAST_BYTES, _MOST_THREADS, len(os.sched_getaffinity(0)))
    if threads < 2:
        _copy(copies)
        return
    parts = list(_parts(copies, -(-nbytes // (8 * threads)) * 8))  # whole elements of any dtype
    failures: list[BaseException] = []

    def copied(number: int) -> None:
        try:
            _copy(parts[number])
        except BaseException as failure:
            failures.append(failure)

    together(copied, len(parts))
    if failures:
        raise failures[0]


def _copy(copies: Sequence[Copy]) -> None:
    for place, array in copies:
        if place.dtype == FLOAT16:
            with np.errstate(over="ignore"):
                place[:] = array
        else:
            place[:] = array


def _parts(copies: Sequence[Copy], most_bytes: int) -> Iterator[list[Copy]]:
    """Cut copies into parts of about as many bytes, arrays in the middle included."""
    part, left = list[Copy](), most_bytes
    for place, array in copies:
        done = 0
        while done < len(place):
            end = min(len(place), done + max(left // place.itemsize, 1))
            part.append((place[done:end], array[done:end]))
            left -= (end - done) * place.itemsize
            done = end
            if left < place.itemsize:
                yield part
                part, left = [], most_bytes
    if part:
        yield part
