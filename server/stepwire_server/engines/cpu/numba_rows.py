"""The text of the kernels that keep gradients in rows and sort them; `numba_module` has the form of the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stepwire_server.engines.cpu.numba_module import (
    BLOCKWISE,
    codec_of,
    gradient_scratch,
    gradient_value,
    gradient_view,
    lines_of,
    module_of,
    view_of,
)
from stepwire_server.rules.treatment import scaled

__all__ = ["rows_source"]

# −0 + 0 is 0: of two zeros no order could tell the smaller.
_KEEP = """def {name}(row_all, gradient, start, begin, size, factor):
    factor = float32(factor)
    {scratch}
    for low in range(0, size, 1024):
        high = min(low + 1024, size)
        {views}
        for i in range(high - low):
            row_now[i] = scaled({value}, factor) + float32(0.0)
"""

# The rows of 512 elements stay in cache while all comparators pass over them. So one kernel serves every network, and
# its inner loop is one vector instruction each for the smaller and the larger.
_SORT = """def {name}(rows, pairs, out, start, rank, size):
    scratch = empty((rows.shape[0], 512), float32)
    for low in range(0, size, 512):
        high = min(low + 512, size)
        for row in range(rows.shape[0]):
            source, target = rows[row], scratch[row]
            for i in range(high - low):
                target[i] = source[start + low + i]
        for pair in range(pairs.shape[0]):
            first, second = scratch[pairs[pair, 0]], scratch[pairs[pair, 1]]
            for i in range(high - low):
                left, right = first[i], second[i]
                first[i] = left if left < right else right
                second[i] = right if left < right else left
        for row in range(out.shape[0]):
            source, target = scratch[rank + row], out[row]
            for i in range(high - low):
                target[low + i] = source[i]
"""

_TEXTS: Final = {"keep": _KEEP, "sort": _SORT}


def rows_source(work: str, name: str, gradient: str | None) -> str:
    """Write the module with the kernel `name`; `CpuKernels.rows` has its arguments."""
    if gradient is None:
        return module_of(name, [], _TEXTS[work].format(name=name))
    functions: list[Callable[..., Any]] = [codec_of("decode", gradient), scaled]
    kernel = _TEXTS[work].format(
        name=name,
        scratch=lines_of(gradient_scratch(gradient, 1024), 4),
        views=lines_of([view_of("row_all", "start", BLOCKWISE), gradient_view(gradient, BLOCKWISE)], 8),
        value=gradient_value(gradient),
    )
    return module_of(name, functions, kernel)
