"""Kernels for the CPU where Numba is missing: the recipe's own functions on blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from stepwire_server.engines.cpu.numpy_exact import EXACT_KERNELS
from stepwire_server.engines.cpu.numpy_rows import ROWS_KERNELS
from stepwire_server.engines.cpu.numpy_table import table_kernel
from stepwire_server.engines.cpu.ufunc_tape import Tape
from stepwire_server.engines.int8_moments import BLOCK as BLOCK_SIZE
from stepwire_server.engines.int8_moments import block_count, decode_blocks, encode_blocks
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.measured_sums import measured_sum
from stepwire_server.engines.payloads import floats_of
from stepwire_server.engines.protocol import HostArray
from stepwire_server.engines.stochastic_rounding import round_stochastically
from stepwire_server.rules import ACCUMULATED, EIGHT_BIT_SLOTS, Precision, Recipe
from stepwire_server.rules.treatment import added, scaled

__all__ = ["NumpyKernels"]

# Elements of a block: the scratch of a tape and the block's state stay in the second-level cache.
BLOCK = 65_536


class NumpyKernels:
    """The kernels of `NumbaKernels`, with the same arguments and, but for telemetry, the same bits."""

    def bound(self, room: KernelRoom) -> None:
        """Change nothing: these kernels are no machine code, and hold next to nothing."""

    def source(self, payload: HostArray) -> HostArray:
        """View a chunk of any wire dtype as the kernels read it."""
        return payload

    def target(self, out: HostArray) -> HostArray:
        """View an array of any wire dtype as the kernels write it."""
        return out

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, out, start, begin, first, size[, sums], *seeds, *scalars)`."""
        states = _array_count(recipe)
        seeds_at = states + (7 if recipe.measures else 6)
        scalars_at = seeds_at + (len(recipe.rule.slots) if recipe.precision is Precision.BFLOAT16 else 0)

        tapes: dict[tuple[str, ...], Tape] = {}

        def kernel(*arguments: Any) -> None:
            gradient, out, start, begin, first, size = arguments[states : states + 6]
            numbers = (np.float32(scalar) for scalar in arguments[scalars_at:])
            scalars = dict(zip(recipe.scalars, numbers, strict=True))
            idle = tuple(name for name in ("factor", "clip") if scalars[name] == 1.0)
            tape = tapes.get(idle) or tapes.setdefault(idle, _tape(recipe, idle))
            scratch = [np.empty(min(BLOCK, size), np.float32) for _ in range(tape.scratch_count)]
            with np.errstate(all="ignore"):
                for low in range(0, size, BLOCK):
                    count = min(BLOCK, size - low)
                    state = _windows(recipe, arguments[:states], start + low, count)
                    values = _variables(recipe, state, floats_of(gradient, begin + low, begin + low + count))
                    squared = _before(recipe, values, scalars)
                    tape.run(values, scalars, scratch)
                    _store(recipe, state, values, arguments[seeds_at:scalars_at])
                    if out is not None:
                        out[first + low : first + low + count] = state[0]
                    if recipe.measures:
                        squared |= {"update": state[0] - squared["update"], "param": state[0]}
                        for index, name in enumerate(recipe.sums):
                            arguments[states + 6][index] += measured_sum(squared[name])

        return kernel

    def sum_of_squares(self, gradient: np.dtype[Any], accumulated: bool) -> Callable[..., None]:
        """Return `kernel([accumulated,] gradient, start, begin, first, size, block, partials, factor)`."""

        def kernel(*arguments: Any) -> None:
            *arrays, gradient, start, begin, first, size, block, partials, factor = arguments
            for low, high in _blocks(first, size, block):
                with np.errstate(all="ignore"):
                    values = scaled(floats_of(gradient, begin + low, begin + high), np.float32(factor))
                    for array in arrays:
                        values = added(values, array[start + low : start + high])
                    partials[0, low // block] = _sum_of_squares(values)

        return kernel

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, start, begin, first, size, block, partials, *scalars[:-1])`."""
        states = _array_count(recipe)

        def kernel(*arguments: Any) -> None:
            gradient, start, begin, first, size, block, partials = arguments[states : states + 7]
            scalars = [np.float32(scalar) for scalar in arguments[states + 7 :]]
            for low, high in _blocks(first, size, block):
                state = _windows(recipe, arguments[:states], start + low, high - low)
                with np.errstate(all="ignore"):
                    values = _variables(recipe, state, floats_of(gradient, begin + low, begin + high))
                    values |= dict(zip(recipe.scalars, scalars, strict=False))
                    partials[0, low // block] = _sum_of_squares(state[0])
                    partials[1, low // block] = _sum_of_squares(recipe.evaluate(recipe.direction_stages, values)["u"])

        return kernel

    def accumulate(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(accumulated, gradient, start, begin, size, factor)`."""
        return _accumulate

    def exact(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., Any]:
        """See `CpuKernels.exact`."""
        return EXACT_KERNELS[work]

    def rows(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., None]:
        """See `CpuKernels.rows`."""
        return ROWS_KERNELS[work]

    def table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> Callable[..., None]:
        """See `CpuKernels.table`."""
        return table_kernel(recipe)


def _accumulate(accumulated: HostArray, gradient: HostArray, start: int, begin: int, size: int, factor: float) -> None:
    with np.errstate(all="ignore"):
        for low, high in _blocks(0, size, BLOCK):
            values = scaled(floats_of(gradient, begin + low, begin + high), np.float32(factor))
            accumulated[start + low : start + high] = added(values, accumulated[start + low : start + high])


def _array_count(recipe: Recipe) -> int:
    """Count the arrays of a recipe's state: a slot held in 8 bits has two."""
    return 1 + len(recipe.slots) + (len(recipe.rule.slots) if recipe.precision is Precision.INT8 else 0)


def _windows(recipe: Recipe, arrays: Sequence[HostArray], start: int, count: int) -> list[HostArray]:
    """Cut the elements `[start, start + count)` out of a recipe's state, maxima of blocks by their blocks."""
    windows, remaining = [arrays[0][start : start + count]], iter(arrays[1:])
    for slot in recipe.slots:
        windows.append(next(remaining)[start : start + count])
        if recipe.precision is Precision.INT8 and slot in recipe.rule.slots:
            windows.append(next(remaining)[start // BLOCK_SIZE : block_count(start + count)])
    return windows


def _tape(recipe: Recipe, idle: Sequence[str]) -> Tape:
    """Trace a recipe; factors named in `idle` are 1, and their stages are left out."""
    stages = [stage for stage in recipe.stages if not (stage.function is scaled and stage.arguments[1] in idle)]
    state = ("p", *recipe.slots.values())
    return Tape(stages, ("g", *state), recipe.scalars, state)


def _before(recipe: Recipe, values: dict[str, Any], scalars: dict[str, np.float32]) -> dict[str, Any]:
    """Return what telemetry needs of the time before the update."""
    if not recipe.measures:
        return {}
    treated = {"gradient": recipe.evaluate(recipe.treatment, values | scalars)["g"]} if recipe.limits else {}
    return {"update": values["p"].copy(), **treated}


def _variables(recipe: Recipe, state: list[HostArray], gradient: HostArray) -> dict[str, Any]:
    """Return what the stages read; state held as bits becomes float32."""
    values: dict[str, Any] = {"p": state[0], "g": gradient}
    remaining = iter(state[1:])
    for slot, variable in recipe.slots.items():
        array = next(remaining)
        if recipe.precision is Precision.INT8 and slot in recipe.rule.slots:
            values[variable] = decode_blocks(array, next(remaining), EIGHT_BIT_SLOTS[slot])
        else:
            values[variable] = _floats(_typed(array))
    return values


def _store(recipe: Recipe, state: list[HostArray], values: dict[str, Any], seeds: tuple[int, ...]) -> None:
    """Encode what is not held as float32, and so was stepped elsewhere; clear what was accumulated."""
    remaining = iter(state[1:])
    for index, (slot, variable) in enumerate(recipe.slots.items()):
        array = next(remaining)
        if slot == ACCUMULATED:
            array[...] = 0.0
        elif slot not in recipe.rule.slots or recipe.precision is Precision.FLOAT32:
            continue
        elif recipe.precision is Precision.BFLOAT16:
            array[...] = round_stochastically(values[variable], seeds[index])
        else:
            array[...], next(remaining)[...] = encode_blocks(values[variable], EIGHT_BIT_SLOTS[slot])


def _typed(array: HostArray) -> HostArray:
    """View a state array, where it is held as bfloat16's bits, as what it is."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def _floats(array: HostArray) -> HostArray:
    return array.astype(np.float32, copy=False)


def _blocks(first: int, size: int, block: int) -> list[tuple[int, int]]:
    return [(low, min(low + block, first + size)) for low in range(first, first + size, block)]


def _sum_of_squares(values: HostArray) -> Any:
    """Square in float64 and add in the order of the Numba kernel; NumPy's reduction along axis 0 adds row after row."""
    squares = values.astype(np.float64)
    squares *= squares
    rows = len(squares) // 1024
    lanes = np.add.reduce(squares[: rows * 1024].reshape(rows, 1024), axis=0)
    lanes[: len(squares) - rows * 1024] += squares[rows * 1024 :]
    return np.add.accumulate(np.add.reduce(lanes.reshape(32, 32), axis=0))[-1]
