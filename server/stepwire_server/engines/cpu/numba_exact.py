"""The text of the kernels that add gradients up exactly; `numba_module` has the form of the modules."""

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
from stepwire_server.engines.exact_scalars import finite_two_sum, float32_of, odd, odd_quotient

__all__ = ["exact_source"]

_SCRATCH: Final = 1024

_STORE = """def {name}(total_all, gradient, start, begin, size, factor):
    {scratch}
    for low in range(0, size, 1024):
        high = min(low + 1024, size)
        {views}
        for i in range(high - low):
            total_now[i] = float64({value}) * factor
"""

# Errors are rare, so they are stored in the first-level cache, and copied where there is one. The loop has no branch.
# An assignment to a slice takes Numba a second to compile, and a loop is no slower.
_ADD = """def {name}(total_all, gradient, errors, start, begin, size, factor, block):
    error_now = empty(1024)
    {scratch}
    done = 0
    while done < size:
        stop = min(size, done + block - (start + done) % block)
        inexact = int64(0)
        for low in range(done, stop, 1024):
            high = min(low + 1024, stop)
            found = int64(0)
            {views}
            for i in range(high - low):
                total_now[i], error = finite_two_sum(total_now[i], float64({value}) * factor)
                error_now[i] = error
                found |= int64(error != 0.0)
            if found != 0:
                if inexact == 0:
                    for i in range(len(errors)):
                        errors[i] = 0.0
                inexact = int64(1)
                place = (start + low) % block
                for i in range(high - low):
                    errors[place + i] = error_now[i]
        done = stop
        if inexact != 0:
            return done
    return 0
"""

_CARRY = """def {name}(level, errors):
    inexact = int64(0)
    changed = int64(0)
    for i in range(len(errors)):
        before = level[i]
        total, error = finite_two_sum(before, errors[i])
        inexact |= int64(error != 0.0)
        changed |= int64((total != before) & (total == total))
        level[i] = total
        errors[i] = error
    return inexact + 2 * changed
"""

_ODD = """def {name}(total, error):
    for i in range(len(error)):
        total[i] = odd(total[i], error[i])
"""

# The quotients may lie in the memory of the totals, which the compiler would not vectorise. They come from there and
# go there by way of the first-level cache. A product with the inverse of a power of two is exact, and a third of the
# time.
_MEAN = """def {name}(total_all, out_all, start, size, divisor, inverse):
    scratch = empty(1024, float32)
    for low in range(0, size, 1024):
        high = min(low + 1024, size)
        {views}
        if inverse != 0.0:
            for i in range(high - low):
                scratch[i] = float32_of(total_now[i] * inverse)
        else:
            for i in range(high - low):
                scratch[i] = float32_of(odd_quotient(total_now[i], divisor))
        for i in range(high - low):
            out_now[i] = scratch[i]
"""

# The partial sums of a place do not overlap, so that all finite float64 have room (Shewchuk 1997, as `math.fsum`). An
# error has the sign of the rest, which decides rounding to odd.
_LINES = """def {name}(numbers, width, firsts, counts, columns, totals, inexact):
    partials = empty(64)
    for place in range(len(firsts)):
        held = 0
        at = firsts[place] * width + columns[place]
        for line in range(counts[place]):
            rest = numbers[at + line * width]
            kept = 0
            for k in range(held):
                rest, error = finite_two_sum(rest, partials[k])
                if error != 0.0:
                    partials[kept] = error
                    kept += 1
            if rest != 0.0:
                partials[kept] = rest
                kept += 1
            held = kept
        total, error = 0.0, 0.0
        while held > 0 and error == 0.0:
            held -= 1
            total, error = finite_two_sum(total, partials[held])
        totals[place] = odd(total, error)
        inexact[place] = error != 0.0
"""

_KERNELS: Final[dict[str, tuple[str, list[Callable[..., Any]]]]] = {
    "store": (_STORE, []),
    "add": (_ADD, [finite_two_sum]),
    "carry": (_CARRY, [finite_two_sum]),
    "odd": (_ODD, [odd]),
    "mean": (_MEAN, [odd_quotient, float32_of]),
    "lines": (_LINES, [finite_two_sum, odd]),
}


def exact_source(work: str, name: str, gradient: str | None) -> str:
    """Write the module with the kernel `name`; `CpuKernels.exact` has its arguments."""
    text, functions = _KERNELS[work]
    views = [view_of("total_all", "start", BLOCKWISE)]
    if gradient is None:
        views.append(view_of("out_all", "start", BLOCKWISE))
    else:
        views.append(gradient_view(gradient, BLOCKWISE))
        functions = [codec_of("decode", gradient), *functions]
    kernel = text.format(
        name=name,
        scratch=lines_of([] if gradient is None else gradient_scratch(gradient, _SCRATCH), 4),
        views=lines_of(views, 12 if work == "add" else 8),
        value="" if gradient is None else gradient_value(gradient),
    )
    return module_of(name, functions, kernel, imported=("int64",))
