"""A list of pure functions as a tape of NumPy ufuncs, so that a block is stepped without allocating anything.

Evaluating a rule on arrays as it stands makes a fresh array for each operation. Some fifteen a block would push the
state out of the cache. So each list of stages is traced once, with stand-ins for its variables that note every ufunc
they meet. The tape knows the last use of each value. Operations use a few scratch arrays in turn, and the last one of a
variable writes to the place of that variable. The order and the operands of all operations stay, so the bits do too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from stepwire_server.engines.protocol import HostArray
from stepwire_server.rules import Stage

__all__ = ["Tape"]


class _Operation(NamedTuple):
    result: int
    ufunc: np.ufunc
    inputs: tuple[int, ...]
    place: int  # where the result goes: a variable (its index), or beyond those a scratch array


class _Value(NDArrayOperatorsMixin):
    """Stands for a value while a tape is traced."""

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape = tape
        self.index = index

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: _Value, **options: Any) -> _Value:
        assert method == "__call__" and not options
        return self.tape._note(ufunc, tuple(value.index for value in inputs))


class Tape:
    """The operations of some stages on one block of elements.

    Values are numbered: first the arrays, then the scalars, then the results in order.
    """

    def __init__(
        self, stages: Sequence[Stage], arrays: Sequence[str], scalars: Sequence[str], stored: Sequence[str]
    ) -> None:
        """Trace.

        Args:
            stages: the stages, in order.
            arrays: the variables that are arrays.
            scalars: those that are scalars.
            stored: the arrays that results of their names are stored in; the others are only read.
        """
        self._arrays = tuple(arrays)
        self._scalars = tuple(scalars)
        self._noted: list[tuple[np.ufunc, tuple[int, ...]]] = []
        self._first = len(arrays) + len(scalars)
        variables = {name: _Value(self, index) for index, name in enumerate((*arrays, *scalars))}
        for function, results, arguments in stages:
            value = function(*[variables[name] for name in arguments])
            variables.update(zip(results, value if isinstance(value, tuple) else (value,), strict=True))
        finals = {index: variables[name].index for index, name in enumerate(self._arrays) if name in stored}
        self._of_scalars = self._scalar_values()
        self._operations, self._copies = self._place(finals)
        self.scratch_count = max((place - len(arrays) + 1 for _, _, _, place in self._operations), default=0)

    def run(
        self, arrays: Mapping[str, HostArray], scalars: Mapping[str, np.float32], scratch: Sequence[HostArray]
    ) -> None:
        """Step one block in place.

        Args:
            arrays: `(n,) float32` of each array variable; what is stored is written into them.
            scalars: the value of each scalar.
            scratch: at least `scratch_count` arrays `(≥ n,) float32`.
        """
        values: list[Any] = [arrays[name] for name in self._arrays]
        places = values + [array[: len(values[0])] for array in scratch[: self.scratch_count]]
        values = values + [scalars[name] for name in self._scalars] + [None] * len(self._noted)
        for index, (ufunc, inputs) in enumerate(self._noted, self._first):
            if index in self._of_scalars:
                values[index] = ufunc(*[values[number] for number in inputs])
        for index, ufunc, inputs, place in self._operations:
            values[index] = ufunc(*[values[number] for number in inputs], out=places[place])
        for source, target in self._copies:
            np.copyto(values[target], values[source])

    def _note(self, ufunc: np.ufunc, inputs: tuple[int, ...]) -> _Value:
        self._noted.append((ufunc, inputs))
        return _Value(self, self._first + len(self._noted) - 1)

    def _scalar_values(self) -> frozenset[int]:
        """Return the results that are made of scalars alone: no arrays, however often they are used."""
        found = set(range(len(self._arrays), self._first))
        for index, (_, inputs) in enumerate(self._noted, self._first):
            if found.issuperset(inputs):
                found.add(index)
        return frozenset(found)

    def _place(self, finals: Mapping[int, int]) -> tuple[list[_Operation], list[tuple[int, int]]]:
        """Give each result a place that nothing needs any more; return the copies that are left to do."""
        last_use = {number: at for at, (_, inputs) in enumerate(self._noted, self._first) for number in inputs}
        wanted = {final: variable for variable, final in finals.items() if final >= self._first}
        passed_on = [
            (final, variable) for variable, final in finals.items() if final < self._first and final != variable
        ]
        kept = [*wanted, *(final for final, _ in passed_on)]
        last_use.update(dict.fromkeys(kept, self._first + len(self._noted)))
        held: dict[int, int] = {}
        free: list[int] = []
        count = len(self._arrays)
        operations: list[_Operation] = []
        copies = passed_on
        for at, (ufunc, inputs) in enumerate(self._noted, self._first):
            if at in self._of_scalars:
                continue
            free += [held.pop(number) for number in set(inputs) & held.keys() if last_use[number] <= at]
            variable = wanted.get(at)
            if variable is None or last_use.get(variable, -1) > at:
                if not free:
                    free.append(count)
                    count += 1
                place = held[at] = free.pop()
                copies += [] if variable is None else [(at, variable)]
            else:
                place = variable
            operations.append(_Operation(at, ufunc, inputs, place))
        return operations, copies
