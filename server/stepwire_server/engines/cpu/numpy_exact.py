"""The kernels that add gradients up exactly, where Numba is missing; `CpuKernels.exact` has their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from stepwire_server.engines.cpu.numpy_lines import sum_lines
from stepwire_server.engines.exact_scalars import rest_of, two_sum
from stepwire_server.engines.payloads import floats_of
from stepwire_server.engines.protocol import HostArray

__all__ = ["EXACT_KERNELS"]

# Elements at a time, whose scratch stays in the second-level cache.
_BATCH: Final = 16_384

_NAN: Final = np.uint32(0x7FC00000).view(np.float32)


def _store(*arguments: Any) -> None:
    total, gradient, start, begin, size, factor = arguments
    with np.errstate(all="ignore"):
        for low in range(0, size, _BATCH):
            high = min(low + _BATCH, size)
            total[start + low : start + high] = _products(gradient, begin + low, begin + high, factor)


def _add(*arguments: Any) -> int:
    total, gradient, errors, start, begin, size, factor, block = arguments
    done: int = 0
    stop: int
    while done < size:
        stop = min(size, done + block - (start + done) % block)
        now, place = total[start + done : start + stop], (start + done) % block
        with np.errstate(all="ignore"):
            now[:], error = _finite_two_sum(now, _products(gradient, begin + done, begin + stop, factor))
        if error.any():
            errors[:] = 0.0
            errors[place : place + stop - done] = error
            return stop
        done = stop
    return 0


def _carry(level: HostArray, errors: HostArray) -> int:
    with np.errstate(all="ignore"):
        total, errors[:] = _finite_two_sum(level, errors)
        changed = bool(((total != level) & (total == total)).any())
    level[:] = total
    return bool(errors.any()) + 2 * changed


def _odd(total: HostArray, error: HostArray) -> None:
    bits = total.view(np.int64)
    moved = (np.abs(error) > 0.0) & (bits & 1 == 0)
    bits += np.where(moved, np.where(bits ^ error.view(np.int64) >= 0, 1, -1), 0)


def _mean(*arguments: Any) -> None:
    total, out, start, size, divisor, inverse = arguments
    for low in range(start, start + size, _BATCH):
        high = min(low + _BATCH, start + size)
        with np.errstate(all="ignore"):
            if inverse:
                quotient = total[low:high] * inverse
            else:
                quotient = total[low:high] / divisor
                _odd(quotient, rest_of(total[low:high], quotient, divisor))
            out[low:high] = np.where(np.isnan(quotient), _NAN, quotient.astype(np.float32))


def _products(gradient: HostArray, begin: int, end: int, factor: float) -> HostArray:
    products: HostArray = floats_of(gradient, begin, end).astype(np.float64)
    products *= factor
    return products


def _finite_two_sum(left: HostArray, right: HostArray) -> tuple[HostArray, HostArray]:
    total, error = two_sum(left, right)
    error[np.isnan(error)] = 0.0
    return total, error


EXACT_KERNELS: Final[dict[str, Callable[..., Any]]] = {
    "store": _store,
    "add": _add,
    "carry": _carry,
    "odd": _odd,
    "mean": _mean,
    "lines": sum_lines,
}
