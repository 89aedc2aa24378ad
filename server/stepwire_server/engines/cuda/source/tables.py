"""CUDA C of the kernels on rows of a table: gather + decode + stages + encode + scatter in one, and the gather alone.

A thread has an element of a row. Neighbouring threads have neighbouring elements, so that a warp moves whole lines of a
row however far apart rows lie. Vectors of four would ask for widths and offsets that are multiples of four.
"""

from __future__ import annotations

from typing import Final

from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.engines.cuda.source.memory import STORED, joined
from stepwire_server.engines.cuda.source.module import Kernel
from stepwire_server.engines.cuda.source.passes import element_call, element_function, store_sums
from stepwire_server.engines.cuda.source.prelude import THREADS
from stepwire_server.engines.cuda.source.updates import element_arrays, element_body
from stepwire_server.rules import Recipe

__all__ = ["gather_kernels", "table_kernel"]

_ROWS: Final = """{element}
extern "C" __global__ void __launch_bounds__({threads}, 3) {name}({parameters}) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    {before}
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {{
        const long long row = i / width, at = rows[row] * width + i % width;
        const float *numbers = scalars + {count} * kinds[row];
        const int k = 0;
        {loads}
        {call}
        {stores}
    }}
    {after}
}}
"""

_GATHER: Final = """
extern "C" __global__ void __launch_bounds__({threads}) {name}(const float *__restrict__ source_all,
        const long long *__restrict__ rows, {kind} *__restrict__ target_all, long long size, long long width) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {{
        target_all[i] = encode_{dtype}(source_all[rows[i / width] * width + i % width]);
    }}
}}
"""


def table_kernel(recipe: Recipe, reply: str | None) -> Kernel:
    """Write the kernel that steps rows by a recipe whose slots are float32; None stands for no reply.

    The kernel's arguments are, in order:

    - pointers to the parameters and the recipe's slots, each at the first element of the table
    - pointers to the gradient, float32, and to the reply, each at the first element of the first row
    - a pointer to the float64 sums of each block of threads, one row a sum, where the recipe measures
    - pointers to the rows (int64), to the kind of each (int32), and to the scalars of each kind (float32)
    - the number of elements of the rows, and of one row, as int64
    """
    name = f"rows_{recipe.name}_to_{reply or 'nothing'}"
    arrays = element_arrays(recipe, "float32", reply)
    sums = [f"sum_{total}" for total in recipe.sums]
    numbers = [f"float {scalar}" for scalar in recipe.scalars]
    call = element_call(name, arrays, sums, numbers)
    arguments, own = call[: call.rindex(recipe.scalars[0])], len(recipe.scalars)
    call = arguments + ", ".join(f"numbers[{k}]" for k in range(own)) + ");"
    places = {array.variable: "i" if array.variable in ("gradient", "out") else "at" for array in arrays}
    pointers = [array.pointer for array in arrays] + (["double *__restrict__ sums"] if sums else [])
    pointers += ["const long long *__restrict__ rows", "const int *__restrict__ kinds"]
    pointers += ["const float *__restrict__ scalars", "long long size", "long long width"]
    loads = [
        f"{each.kind} {each.variable}s[1] = {{{each.variable}_all[{places[each.variable]}]}};"
        if each.read
        else f"{each.kind} {each.variable}s[1];"
        for each in arrays
    ]
    written = [each.variable for each in arrays if each.written]
    text = _ROWS.format(
        name=name,
        threads=THREADS,
        element=element_function(name, arrays, element_body(recipe, "float32", reply), sums, numbers),
        parameters=", ".join(pointers),
        before=joined([f"Squares {total} = {{}};" for total in sums], 4),
        count=own,
        loads=joined(loads, 8),
        call=call,
        stores=joined([f"{variable}_all[{places[variable]}] = {variable}s[0];" for variable in written], 8),
        after=joined(store_sums(sums), 4),
    )
    return Kernel(name, text, tuple(functions_of_stages(recipe.stages)))


def gather_kernels() -> list[Kernel]:
    """Write `gather_<dtype>(source, rows, target, size, width)`: rows of a table of float32, encoded one by one.

    The source is the first element of the table. Rows are int64, as are the size, in elements, and the width.
    """
    return [
        Kernel(f"gather_{dtype}", _GATHER.format(name=f"gather_{dtype}", threads=THREADS, kind=kind, dtype=dtype))
        for dtype, kind in STORED.items()
    ]
