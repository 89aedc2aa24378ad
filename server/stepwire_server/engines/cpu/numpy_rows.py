"""The kernels that keep gradients in rows and sort them, where Numba is missing; see `CpuKernels.rows`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from stepwire_server.engines.payloads import floats_of
from stepwire_server.rules.treatment import scaled

__all__ = ["ROWS_KERNELS"]

_BATCH: Final = 16_384


def _keep(*arguments: Any) -> None:
    row, gradient, start, begin, size, factor = arguments
    with np.errstate(all="ignore"):
        for low in range(0, size, _BATCH):
            high = min(low + _BATCH, size)
            values = scaled(floats_of(gradient, begin + low, begin + high), np.float32(factor))
            np.add(values, np.float32(0.0), out=row[start + low : start + high])


def _sort(*arguments: Any) -> None:
    rows, pairs, out, start, rank, size = arguments
    for low in range(0, size, _BATCH):
        high = min(low + _BATCH, size)
        now = rows[:, start + low : start + high].copy()
        for first, second in pairs.tolist():
            ordered = now[first] < now[second]
            now[[first, second]] = np.where(ordered, now[[first, second]], now[[second, first]])
        out[:, low:high] = now[rank : rank + len(out)]


ROWS_KERNELS: Final[dict[str, Callable[..., None]]] = {"keep": _keep, "sort": _sort}
