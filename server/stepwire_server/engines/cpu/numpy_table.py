"""The kernel of `CpuKernels.table` where Numba is missing: rows are gathered, stepped by the recipe, and scattered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from stepwire_server.engines.measured_sums import measured_sum
from stepwire_server.engines.payloads import floats_of
from stepwire_server.rules import Recipe

__all__ = ["table_kernel"]

_BATCH: Final = 65_536


def table_kernel(recipe: Recipe) -> Callable[..., None]:
    """Return the kernel of a recipe; `CpuKernels.table` has its arguments."""
    names = ("p", *recipe.slots.values())

    def kernel(*arguments: Any) -> None:
        arrays = arguments[: len(names)]
        gradient, rows, kinds, scalars, out, start, width, begin, first, size, sums = arguments[len(names) :]
        most = max(_BATCH // max(width, 1), 1)
        with np.errstate(all="ignore"):
            for low in range(first, first + size, most):
                high = min(low + most, first + size)
                at = start + rows[low:high, np.newaxis] * width + np.arange(width)
                values = {name: array[at] for name, array in zip(names, arrays, strict=True)}
                values["g"] = floats_of(gradient, (begin + low) * width, (begin + high) * width).reshape(at.shape)
                lines = scalars[kinds[low:high]]
                values |= {name: lines[:, k, np.newaxis] for k, name in enumerate(recipe.scalars)}
                after = recipe.evaluate(recipe.stages, values)
                for name, array in zip(names, arrays, strict=True):
                    array[at] = after[name]
                if out is not None:
                    out[low * width : high * width] = after["p"].reshape(-1)
                for index, total in enumerate(recipe.sums):
                    sums[index] += measured_sum(_squared(recipe, total, values, after))

    return kernel


def _squared(recipe: Recipe, total: str, before: dict[str, Any], after: dict[str, Any]) -> Any:
    """Return the values, `(n,) float32`, whose squares make one of the recipe's sums."""
    if total == "gradient":
        return recipe.evaluate(recipe.treatment, before)["g"].reshape(-1)
    return (after["p"] - before["p"] if total == "update" else after["p"]).reshape(-1)
