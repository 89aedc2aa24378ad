"""The text of the kernels that step rows of a table; `numba_module` has the form of the modules.

The arithmetic of an element is that of a dense update. A kernel gathers the elements of a row where they lie, steps
them and scatters them in one pass. A row is contiguous, so the loop over its elements vectorises as the dense one does.
Rows rise, so that the pass goes through memory in one direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stepwire_server.engines.compiled.rule_source import functions_of_stages
from stepwire_server.engines.cpu.numba_module import codec_of, lines_of, module_of
from stepwire_server.engines.cpu.numba_source import element_body
from stepwire_server.rules import Recipe

__all__ = ["table_source"]

_UPDATE: Final = """def {name}({arrays}, gradient, rows, kinds, scalars, out, start, width, begin, first, size, sums):
    {zeros}
    for row in range(first, first + size):
        base = start + rows[row] * width
        kind = kinds[row]
        {numbers}
        {views}
        for i in range(width):
            {body}
    {totals}
"""

_SQUARED: Final = {"update": "(p - before)", "param": "p", "gradient": "treated"}


def table_source(recipe: Recipe, name: str, reply: str | None) -> str:
    """Write the module with the kernel `name`; `CpuKernels.table` has its arguments."""
    arrays = ["p", *recipe.slots.values()]
    views = [f"{array}_now = {array}_all[base : base + width]" for array in arrays]
    views += ["gradient_now = gradient[(begin + row) * width : (begin + row + 1) * width]"]
    views += ["out_now = out[row * width : (row + 1) * width]"] if reply is not None else []
    # In float64 squares leave no range; the pass waits for memory, so that it costs nothing that would show.
    squares = [f"sum_{total} += float64({_SQUARED[total]}) * float64({_SQUARED[total]})" for total in recipe.sums]
    kernel = _UPDATE.format(
        name=name,
        arrays=", ".join(f"{array}_all" for array in arrays),
        zeros=lines_of([f"sum_{total} = 0.0" for total in recipe.sums], 4),
        numbers=lines_of([f"{scalar} = scalars[kind, {k}]" for k, scalar in enumerate(recipe.scalars)], 8),
        views=lines_of(views, 8),
        body=lines_of(element_body(recipe, "float32", reply) + squares, 12),
        totals=lines_of([f"sums[{k}] += sum_{total}" for k, total in enumerate(recipe.sums)] or ["return"], 4),
    )
    codecs: list[Callable[..., Any]] = [codec_of("decode", "float32")]
    codecs += [codec_of("encode", reply)] if reply is not None else []
    functions: list[Callable[..., Any]] = [*codecs, *functions_of_stages(recipe.stages)]
    return module_of(name, functions, kernel, "measuring_kernel" if recipe.measures else "kernel")
