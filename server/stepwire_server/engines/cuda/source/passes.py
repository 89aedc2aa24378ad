"""Kernels that go once through arrays of neighbouring elements: those that change them, and those that sum squares."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stepwire_server.engines.cuda.source.memory import BLOCKS, LANES, Array, joined
from stepwire_server.engines.cuda.source.module import Kernel
from stepwire_server.engines.cuda.source.prelude import THREADS
from stepwire_server.engines.protocol import GRAIN

__all__ = [
    "FlatPass",
    "SummingPass",
    "element_call",
    "element_function",
    "flat_kernel",
    "openings",
    "places",
    "preludes",
    "store_sums",
    "summing_kernel",
]

# Bounds on registers keep four blocks of threads on a multiprocessor, whose loads together hide the memory's latency.
# Of kernels that hold much at once, which spilled otherwise, three blocks stay there: see `FlatPass.crowded`.
#
# The work on an element is a function of its own, so that it is written once for both loops. The second loop works on
# the elements outside vectors: the head, up to the first place where all arrays are aligned, and the tail. Without such
# a place it works on all of them.
_FLAT = """{element}
extern "C" __global__ void __launch_bounds__({threads}, {resident}) {name}({parameters}) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    {before}
    for (long long i = first; i < vectors; i += stride) {{
        const long long at = head + 4 * i;
        {fours}
    }}
    for (long long i = first; i < size - 4 * vectors; i += stride) {{
        const long long at = i < head ? i : i + 4 * vectors;
        {ones}
    }}
    {after}
}}
"""

# The order of additions is that of `numba_source`. Element i of a block of `GRAIN` goes into lane i mod 1024, and then
# the lanes are folded. A block of threads makes one such sum after another. Accumulating in double is the contract of
# `sum_of_squares`. The square of a float is exact in double, so that the fused operation gives the bits of two.
_SUMS = """
extern "C" __global__ void __launch_bounds__({threads}, 4) {name}({parameters}) {{
    __shared__ double lanes[{lanes}];
    const long long blocks = (size + {grain} - 1) / {grain};
    {before}
    for (long long block = blockIdx.x; block < blocks; block += gridDim.x) {{
        const long long low = block * {grain};
        const int count = size - low < {grain} ? (int)(size - low) : {grain};
        {totals}
        for (int lane = 4 * (int)threadIdx.x; lane < count; lane += {step}) {{
            const long long at = low + lane;
            {loads}
            #pragma unroll
            for (int k = 0; k < {width}; ++k) {{
                if (lane + {lanes} * (k / 4) + k % 4 >= count) continue;
                {body}
            }}
        }}
        {folds}
    }}
}}
"""


class FlatPass(NamedTuple):
    """The work of a kernel that does the same to each element.

    Attributes:
        arrays: the arrays that the kernel goes through.
        body: the statements that turn the variables of the arrays read into those of the arrays written.
        numbers: the declarations of the numbers that the body needs.
        functions: the functions that the body calls.
        sums: the variables of `Squares` that the body adds to.
        finds_head: the kernel uses vectors where all arrays are aligned as they are, and is told no head.
        crowded: the kernel holds much at once, even without sums, and needs more registers.
    """

    arrays: Sequence[Array]
    body: Iterable[str]
    numbers: Sequence[str] = ()
    functions: tuple[types.FunctionType, ...] = ()
    sums: Sequence[str] = ()
    finds_head: bool = False
    crowded: bool = False


class SummingPass(NamedTuple):
    """The work of a kernel that sums squares.

    Attributes:
        arrays: the arrays that the kernel goes through.
        body: the statements that make the variables of element k, at `at`, of the elements read: `<variable>s[k]`.
        squared: the variables.
        numbers: the declarations of the numbers that the body needs.
        functions: the functions that the body calls.
        pointers: the declarations of the pointers; None for the arrays and `partials`.
        before: the statements before everything.
        rows: the number of rows of lanes whose loads are under way at once.
    """

    arrays: Sequence[Array]
    body: Sequence[str]
    squared: Sequence[str]
    numbers: Sequence[str]
    functions: tuple[types.FunctionType, ...]
    pointers: Sequence[str] | None = None
    before: Sequence[str] = ()
    rows: int = 4


def flat_kernel(name: str, work: FlatPass) -> Kernel:
    """Write a kernel that does the same to each element, four at a time where they are aligned.

    Its parameters are the arrays, the sums, the size, the head, the places of arrays in blocks, and the numbers. The
    sums are a pointer to those of each block of threads, where there are any.
    """
    arrays, body, numbers, functions, sums, finds_head, crowded = work
    before = openings(arrays)
    before += [f"const long long head = {_all_aligned(arrays)} ? 0 : size;"] if finds_head else []
    before += ["const long long vectors = (size - head) / 4;", *(f"Squares {total} = {{}};" for total in sums)]
    parameters = [array.pointer for array in arrays] + (["double *__restrict__ sums"] if sums else [])
    parameters += ["long long size"] if finds_head else ["long long size", "long long head"]
    call = element_call(name, arrays, sums, numbers)
    text = _FLAT.format(
        name=name,
        threads=THREADS,
        resident=3 if sums or crowded else 4,
        element=element_function(name, arrays, body, sums, numbers),
        parameters=", ".join([*parameters, *places(arrays), *numbers]),
        before=joined(before, 4),
        fours=joined(_moved(arrays, "four", 4, call), 8),
        ones=joined(_moved(arrays, "one", 1, call), 8),
        after=joined(store_sums(sums), 4),
    )
    return Kernel(name, text, functions, preludes(arrays))


def summing_kernel(name: str, work: SummingPass) -> Kernel:
    """Write a kernel that sums the squares of variables over each `GRAIN` elements, in a fixed order.

    Its parameters are the pointers, the size, the places of arrays in blocks and the numbers. `partials`, one of the
    pointers, gets the sums of the first variable for each block of elements, then those of the next.
    """
    arrays, body, squared, numbers, functions, pointers, before, rows = work
    pointers = [*(array.pointer for array in arrays), "double *__restrict__ partials"] if pointers is None else pointers
    loads = [f"{array.kind} {array.variable}s[{4 * rows}];" for array in arrays]
    loads += [
        f"load_rows<{rows}>({v}_all + at, {v}s, count - lane, aligned({v}_all));" for v in (a.variable for a in arrays)
    ]
    additions = [f"totals_{v}[k % 4] = fma((double){v}, (double){v}, totals_{v}[k % 4]);" for v in squared]
    folds = [f"fold_lanes(totals_{v}, lanes, partials + {k} * blocks + block);" for k, v in enumerate(squared)]
    text = _SUMS.format(
        name=name,
        threads=THREADS,
        parameters=", ".join([*pointers, "long long size", *places(arrays), *numbers]),
        lanes=LANES,
        grain=GRAIN,
        step=rows * LANES,
        width=4 * rows,
        before=joined([*openings(arrays), *before], 4),
        totals=joined([f"double totals_{v}[4] = {{0.0, 0.0, 0.0, 0.0}};" for v in squared], 8),
        loads=joined(loads, 12),
        body=joined([*body, *additions], 16),
        folds=joined(folds, 8),
    )
    return Kernel(name, text, functions, preludes(arrays))


def element_function(
    kernel: str, arrays: Iterable[Array], body: Iterable[str], sums: Iterable[str], numbers: Iterable[str]
) -> str:
    """Write what a kernel does to one element as a function."""
    parameters = [*(array.parameter for array in arrays), *(f"Squares &{total}" for total in sums), *numbers]
    return f"__device__ __forceinline__ void {kernel}_element({', '.join(parameters)}) {{\n    {joined(body, 4)}\n}}\n"


def element_call(kernel: str, arrays: Iterable[Array], sums: Iterable[str], numbers: Iterable[str]) -> str:
    """Call that function for element k of what a thread holds: `<variable>s`."""
    arguments = [*(f"{array.variable}s[k]" for array in arrays), *sums, *(number.split()[-1] for number in numbers)]
    return f"{kernel}_element({', '.join(arguments)});"


def places(arrays: Iterable[Array]) -> list[str]:
    """Declare the places of what lies in blocks."""
    return [place for array in arrays for place in array.places]


def openings(arrays: Iterable[Array]) -> list[str]:
    """Write the statements that let what lies in blocks be read like the other arrays."""
    return [line for array in arrays for line in array.opening]


def preludes(arrays: Iterable[Array]) -> tuple[str, ...]:
    """Return what the arrays need of a module."""
    return (BLOCKS,) if any(array.in_blocks for array in arrays) else ()


def store_sums(sums: Iterable[str]) -> list[str]:
    """Write the statements that add up what the threads of each block have summed, one row a sum."""
    return [f"sum_block({total}, sums + {k}u * gridDim.x + blockIdx.x);" for k, total in enumerate(sums)]


def _moved(arrays: Sequence[Array], how: str, width: int, call: str) -> list[str]:
    """Write what a thread does to `width` neighbours: all loads, the arithmetic, all stores."""
    lines = [f"{array.kind} {array.variable}s[{width}];" for array in arrays]
    lines += [f"load_{how}({array.variable}_all + at, {array.variable}s);" for array in arrays if array.read]
    lines += ["#pragma unroll", f"for (int k = 0; k < {width}; ++k) {call}"]
    return lines + [f"store_{how}({array.variable}_all + at, {array.variable}s);" for array in arrays if array.written]


def _all_aligned(arrays: Iterable[Array]) -> str:
    return " && ".join(f"aligned({array.variable}_all)" for array in arrays)
