"""Kernels for the CPU where Numba is missing: the rule's own function on blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepwire_server.engines.protocol import HostArray
from stepwire_server.rules import Rule

__all__ = ["NumpyKernels"]

# Elements of a block. The rule makes about fifteen temporaries of this size; at 64 KiB each they stay in cache
# and malloc hands the same ones out again. Evaluating the rule into preallocated scratch would need a second
# form of it and gains a tenth (220 → 195 ms for 32 M elements); a second thread only fights for the GIL.
BLOCK = 16_384


class NumpyKernels:
    """The kernels of `NumbaKernels`, with the same arguments and results, to the last bit."""

    def source(self, payload: HostArray) -> HostArray:
        """View a chunk of any wire dtype as the kernels read it."""
        return payload

    def target(self, out: HostArray) -> HostArray:
        """View an array of any wire dtype as the kernels write it."""
        return out

    def update(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, out, start, begin, first, size, *scalars)`."""
        states = 1 + len(rule.slots)

        def kernel(*arguments: Any) -> None:
            gradient, out, start, begin, first, size = arguments[states : states + 6]
            with np.errstate(all="ignore"):
                scalars = [np.float32(scalar) for scalar in arguments[states + 6 :]]
                for low in range(0, size, BLOCK):
                    count = min(BLOCK, size - low)
                    state = [array[start + low : start + low + count] for array in arguments[:states]]
                    g = gradient[begin + low : begin + low + count].astype(np.float32, copy=False)
                    for array, value in zip(state, rule.update(state[0], g, *state[1:], *scalars), strict=True):
                        array[...] = value
                    if out is not None:
                        out[first + low : first + low + count] = state[0]

        return kernel

    def sum_of_squares(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(gradient, begin, first, size, block, partials)`."""
        return _sum_of_squares


def _sum_of_squares(gradient: HostArray, begin: int, first: int, size: int, block: int, partials: HostArray) -> None:
    for low in range(first, first + size, block):
        high = min(low + block, first + size)
        with np.errstate(all="ignore"):
            values = gradient[begin + low : begin + high].astype(np.float32, copy=False).astype(np.float64)
            values *= values
            partials[low // block] = _sum_in_lanes(values)


def _sum_in_lanes(values: HostArray) -> Any:
    """Add in the order of the Numba kernel; NumPy's reduction along the first axis adds row after row."""
    rows = len(values) // 1024
    lanes = np.add.reduce(values[: rows * 1024].reshape(rows, 1024), axis=0)
    lanes[: len(values) - rows * 1024] += values[rows * 1024 :]
    return np.add.accumulate(np.add.reduce(lanes.reshape(32, 32), axis=0))[-1]
