"""The arrays of one session in GPU memory, and the calls of kernels on ranges of them. Unverified on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from stepwire_server.engines.chunks import STORED, StagedChunk, bits_of, check_range, convert
from stepwire_server.engines.cuda_kernels import CudaKernels, blocks_for, launch
from stepwire_server.engines.cuda_source import measured_slots
from stepwire_server.engines.protocol import PARAM, EngineState, Gradient, HostArray, Pass
from stepwire_server.engines.rounding import seeds_for
from stepwire_server.engines.shares import GRAIN
from stepwire_server.rules import ACCUMULATED, Precision
from stepwire_server.rules.treatment import added, scaled

__all__ = ["CudaState"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class CudaState:
    """The arrays of one session; see `EngineState`. Unverified on a GPU."""

    def __init__(self, kernels: CudaKernels, arrays: dict[str, Any], size: int) -> None:
        """Take over zeroed device arrays `(size,)`, one a slot: float32, or uint16 with the patterns of bfloat16."""
        self._kernels = kernels
        self._arrays = arrays
        self._size = size

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return sum(array.nbytes for array in self._arrays.values())

    def stage(self, payload: HostArray) -> StagedChunk:
        """See `EngineState.stage`."""
        return StagedChunk(payload.dtype, self._kernels.upload(bits_of(payload)))

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> float:
        """See `EngineState.sum_of_squares`; the same bits as on the CPU."""
        chunk = self._checked(gradient, begin, end, accumulated)
        kind = "sum" if accumulated is None else "sum_accumulated"
        kernel = self._kernels.of_gradients(f"{kind}_{chunk.dtype.name}")
        arrays = [] if accumulated is None else self._ranges([ACCUMULATED], accumulated, end - begin)
        (total,) = self._sums(1, kernel, [*arrays, chunk.values[begin:end]], end - begin, [factor])
        return total

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """See `EngineState.accumulate`."""
        chunk, size = self._checked(gradient, begin, end, start), end - begin
        if size == 0:
            return
        kernel = self._kernels.of_gradients(f"accumulate_{chunk.dtype.name}")
        arrays = [*self._ranges([ACCUMULATED], start, size), chunk.values[begin:end]]
        with self._kernels.device():
            launch(kernel, blocks_for(size), *arrays, np.int64(size), np.float32(factor))

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> tuple[float, float]:
        """See `EngineState.measure`; the same bits as on the CPU."""
        chunk, recipe = self._checked(gradient, begin, end, start), step.recipe
        kernel = self._kernels.measure(recipe, chunk.dtype)
        arrays = self._ranges([PARAM, *measured_slots(recipe)], start, end - begin)
        param, direction = self._sums(2, kernel, [*arrays, chunk.values[begin:end]], end - begin, step.scalars[:-1])
        return param, direction

    def fetch(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> HostArray:
        """See `EngineState.fetch`; computed on the host."""
        chunk = self._checked(gradient, begin, end, accumulated)
        with np.errstate(all="ignore"):
            values = scaled(self._floats(chunk.values[begin:end], chunk.dtype), np.float32(factor))
            if accumulated is not None:
                values = added(values, self._fetched(ACCUMULATED, accumulated, end - begin))
        return np.asarray(values, np.float32)

    def fetch_direction(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> HostArray:
        """See `EngineState.fetch_direction`; computed on the host."""
        chunk, recipe = self._checked(gradient, begin, end, start), step.recipe
        names = {PARAM: "p"} | {slot: recipe.slots[slot] for slot in measured_slots(recipe)}
        variables: dict[str, Any] = dict(zip(recipe.scalars, map(np.float32, step.scalars), strict=True))
        variables |= {name: self._fetched(slot, start, end - begin) for slot, name in names.items()}
        variables["g"] = self._floats(chunk.values[begin:end], chunk.dtype)
        with np.errstate(all="ignore"):
            return np.asarray(recipe.evaluate(recipe.direction_stages, variables)["u"], np.float32)

    def update(
        self,
        step: Pass,
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> tuple[float, ...]:
        """See `EngineState.update`."""
        chunk, recipe, size = self._checked(gradient, begin, end, start), step.recipe, end - begin
        if out is not None:
            check_range("answer", 0, size, len(out))
        if size == 0:
            return (0.0,) * len(recipe.sums)
        kernel = self._kernels.update(recipe, chunk.dtype, None if out is None else out.dtype)
        arrays = [*self._ranges([PARAM, *recipe.slots], start, size), chunk.values[begin:end]]
        seeds = seeds_for(step.seed, len(recipe.rule.slots)) if recipe.precision is Precision.BFLOAT16 else ()
        numbers = [np.int64(size), *map(np.uint32, seeds), *map(np.float32, step.scalars)]
        blocks = blocks_for(size, recipe.measures)
        with self._kernels.device():
            cupy = self._kernels.cupy
            answer = [] if out is None else [cupy.empty(size, STORED[out.dtype])]
            sums = [cupy.empty(blocks * len(recipe.sums), np.float32)] if recipe.measures else []
            launch(kernel, blocks, *arrays, *answer, *sums, *numbers)
            if out is not None:
                answer[0].get(out=bits_of(out[:size]))
            return _totals(sums[0].get(), len(recipe.sums)) if sums else ()

    def read(self, slot: str, start: int, out: HostArray) -> None:
        """See `EngineState.read`; encoded on the host."""
        check_range("state", start, start + len(out), self._size)
        array = self._arrays[slot]
        convert(_typed(self._get(array[start : start + len(out)])), out)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`; on the host, what bfloat16 cannot hold is rounded to nearest even."""
        check_range("state", start, start + len(values), self._size)
        array = self._arrays[slot]
        stored = np.empty(len(values), array.dtype)
        convert(values, _typed(stored))
        self._kernels.overwrite(array[start : start + len(values)], stored)

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        assert isinstance(other, CudaState) and other._size == self._size
        for slot, array in list(other._arrays.items()):
            if array.dtype != self._arrays[slot].dtype:
                self._narrow(array, self._arrays[slot])
            else:
                other._arrays[slot], self._arrays[slot] = self._arrays[slot], array
        other.close()

    def close(self) -> None:
        """See `EngineState.close`; zeroed before, since CuPy's pool hands memory on as it is."""
        arrays, self._arrays, self._size = self._arrays, {}, 0
        with self._kernels.device():
            for array in arrays.values():
                array.fill(0)
        arrays.clear()
        self._kernels.free_unused()

    def _narrow(self, values: Any, halves: Any) -> None:
        if self._size > 0:
            with self._kernels.device():
                launch(
                    self._kernels.of_gradients("narrow"), blocks_for(self._size), values, halves, np.int64(self._size)
                )

    def _checked(self, gradient: Gradient, begin: int, end: int, start: int | None) -> StagedChunk:
        assert isinstance(gradient, StagedChunk)
        check_range("gradient", begin, end, len(gradient))
        if start is not None:
            check_range("state", start, start + end - begin, self._size)
        return gradient

    def _ranges(self, slots: Iterable[str], start: int, size: int) -> list[Any]:
        return [self._arrays[slot][start : start + size] for slot in slots]

    def _sums(
        self, count: int, kernel: Any, arrays: Sequence[Any], size: int, scalars: Iterable[float]
    ) -> tuple[float, ...]:
        """Run a kernel that makes `count` sets of lanes, and add those up in the order of the CPU."""
        if size == 0:
            return (0.0,) * count
        blocks = -(-size // GRAIN)
        fold, groups = self._kernels.of_gradients("fold"), count * blocks
        with self._kernels.device():
            lanes, folded, sums = (self._kernels.cupy.empty(groups * n, np.float64) for n in (1024, 32, 1))
            numbers = [np.int64(size), *map(np.float32, scalars)]
            launch(kernel, blocks_for(blocks * 1024), *arrays, lanes, *numbers)
            launch(fold, blocks_for(groups * 32), lanes, folded, np.int64(32), np.int64(groups * 32))
            launch(fold, blocks_for(groups), folded, sums, np.int64(1), np.int64(groups))
            return tuple(math.fsum(row) for row in sums.get().reshape(count, blocks))

    def _fetched(self, slot: str, start: int, size: int) -> HostArray:
        values = np.empty(size, np.float32)
        self.read(slot, start, values)
        return values

    def _floats(self, values: Any, dtype: np.dtype[Any]) -> HostArray:
        floats: HostArray = self._get(values).view(dtype).astype(np.float32)
        return floats

    def _get(self, values: Any) -> HostArray:
        with self._kernels.device():
            copy: HostArray = values.get()
        return copy


def _typed(stored: HostArray) -> HostArray:
    typed: HostArray = stored.view(_BFLOAT16) if stored.dtype == np.uint16 else stored
    return typed


def _totals(sums: HostArray, count: int) -> tuple[float, ...]:
    totals = sums.reshape(count, -1).sum(axis=1, dtype=np.float64)
    return tuple(totals.tolist())
