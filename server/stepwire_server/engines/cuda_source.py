"""CUDA C from a recipe's Python functions: decode + stages + encode in one kernel.

The text needs no header, so that NVRTC, nvcc and a C++ compiler with a small shim all take it. Compiled with
`COMPILE_OPTIONS` (no fused multiply-add; division, square root and subnormals are IEEE by default), the kernels give
the CPU engine's bits: `a*b + c` rounds twice on both. Memory bounds the pass either way.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stepwire_server.engines.cuda_codecs import PRELUDE
from stepwire_server.engines.cuda_printer import print_call, print_function
from stepwire_server.engines.rule_source import functions_of_stages
from stepwire_server.engines.shares import GRAIN
from stepwire_server.rules import ACCUMULATED, AVERAGE, Precision, Recipe, Stage
from stepwire_server.rules.treatment import added, scaled

__all__ = [
    "COMPILE_OPTIONS",
    "Kernel",
    "gradient_kernels",
    "measure_kernel",
    "measured_slots",
    "module_source",
    "update_kernel",
]

COMPILE_OPTIONS = ("--fmad=false",)

# C types of the wire dtypes as stored.
_STORED = {"float32": "float", "bfloat16": "unsigned short", "float16": "unsigned short"}


class Kernel(NamedTuple):
    """One kernel of a module.

    Attributes:
        name: of its entry point.
        text: CUDA C that needs the functions, and those of `PRELUDE`.
        functions: Python functions that it calls, each after those it calls.
    """

    name: str
    text: str
    functions: tuple[types.FunctionType, ...] = ()


_EACH = """
extern "C" __global__ void {name}({parameters}) {{
    const long long stride = (long long)gridDim.x * blockDim.x;{before}
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {{
        {body}
    }}{after}
}}
"""

# A thread is a lane of a block of elements: the order of additions is that of `numba_source`. Accumulating in double
# is the contract of `sum_of_squares`; one multiply and one add an element stay below the cost of loading it even where
# double runs at 1/64 of the speed of float.
_SUM = """
extern "C" __global__ void {name}({parameters}) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long count = (size + {grain} - 1) / {grain} * 1024;
    for (long long lane = (long long)blockIdx.x * blockDim.x + threadIdx.x; lane < count; lane += stride) {{
        const long long begin = lane / 1024 * {grain};
        const long long end = begin + {grain} < size ? begin + {grain} : size;
        {totals}
        for (long long i = begin + lane % 1024; i < end; i += 1024) {{
            {body}
        }}
        {stores}
    }}
}}
"""

_FOLD = """
extern "C" __global__ void fold(
    const double *__restrict__ values, double *__restrict__ sums, long long width, long long size) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {
        const double *first = values + i / width * 32 * width + i % width;
        double total = first[0];
        for (int term = 1; term < 32; ++term) total += first[term * width];
        sums[i] = total;
    }
}
"""


def module_source(kernels: Iterable[Kernel]) -> str:
    """Write a module with these kernels; functions that they share stand in it once."""
    functions: dict[str, types.FunctionType] = {}
    texts = []
    for kernel in kernels:
        texts.append(kernel.text)
        for function in kernel.functions:
            assert functions.setdefault(function.__name__, function) is function, (
                f"two functions are called {function.__name__}"
            )
    return "\n".join([PRELUDE, *map(print_function, functions.values()), *texts])


def update_kernel(recipe: Recipe, gradient: str, reply: str | None) -> Kernel:
    """Write the fused kernel of a recipe, a gradient's dtype and a reply's (None: no answer).

    It takes pointers to the parameters, the recipe's slots, the gradient and, where there is one, the answer, each at
    its first element; for a recipe that measures, to the float32 sums of each block of threads, one row a sum; then
    the size as int64, a seed as uint32 for each slot held as bfloat16, and the recipe's scalars as float32.
    """
    name = f"{recipe.name}_{gradient}_to_{reply or 'nothing'}"
    parameters = _arrays(recipe, recipe.slots, "") + [_source(gradient)]
    parameters += [f"{_STORED[reply]} *__restrict__ out"] if reply is not None else []
    parameters += ["float *__restrict__ sums"] if recipe.measures else []
    parameters += ["long long size", *(f"unsigned int seed_{recipe.slots[slot]}" for slot in _rounded(recipe))]
    parameters += [f"float {scalar}" for scalar in recipe.scalars]
    sums = "".join(
        f"\n    sum_block(sum_{total}, sums + {k}u * gridDim.x + blockIdx.x);" for k, total in enumerate(recipe.sums)
    )
    text = _EACH.format(
        name=name,
        parameters=", ".join(parameters),
        before="".join(f"\n    float sum_{total} = 0.0f;" for total in recipe.sums),
        body=_lines(_update_body(recipe, gradient, reply), 8),
        after=sums,
    )
    return Kernel(name, text, tuple(functions_of_stages(recipe.stages)))


def measure_kernel(recipe: Recipe, gradient: str) -> Kernel:
    """Write the kernel that squares the parameters and a layerwise rule's direction.

    It takes pointers to the parameters, `measured_slots`, the gradient and the lanes, first all those of the
    parameters; then the size as int64, and the recipe's scalars but the last as float32.
    """
    slots = measured_slots(recipe)
    body = [*_loads(recipe, slots, gradient), "float u;", *map(print_call, recipe.direction_stages)]
    functions = tuple(functions_of_stages(recipe.direction_stages))
    arrays, scalars = _arrays(recipe, slots, "const "), recipe.scalars[:-1]
    return _summing(f"measure_{recipe.name}_{gradient}", arrays, gradient, scalars, body, ("p", "u"), functions)


def measured_slots(recipe: Recipe) -> tuple[str, ...]:
    """Return the slots that `measure_kernel` reads, in order."""
    return tuple(slot for slot in recipe.slots if slot != AVERAGE)


def gradient_kernels() -> list[Kernel]:
    """Write the kernels that no recipe changes.

    `accumulate_<dtype>(accumulated, gradient, size, factor)` adds up; `sum_<dtype>(gradient, lanes, size, factor)`
    makes 1024 sums of the squares of each block of `GRAIN` elements, the last perhaps shorter, and
    `sum_accumulated_<dtype>` takes the accumulated gradient before all that. `fold(values, sums, width, size)` adds
    each 32 values that lie `width` apart; first with width 32 and then with width 1, it leaves one sum a block.
    `narrow(values, halves, size)` rounds float32 to bfloat16. Sizes and widths are int64, lanes and sums float64.
    """
    kernels = [Kernel("fold", _FOLD), _narrow()]
    for gradient in _STORED:
        kernels += [_sum(gradient, accumulated=False), _sum(gradient, accumulated=True), _accumulate(gradient)]
    return kernels


def _sum(gradient: str, accumulated: bool) -> Kernel:
    name = f"sum_accumulated_{gradient}" if accumulated else f"sum_{gradient}"
    stages = [Stage(scaled, ("g",), ("g", "factor"))]
    stages += [Stage(added, ("g",), ("g", "accumulated"))] if accumulated else []
    body = [f"float g = decode_{gradient}(gradient[i]);"]
    body += ["float accumulated = accumulated_all[i];"] if accumulated else []
    arrays = ["const float *__restrict__ accumulated_all"] if accumulated else []
    functions = tuple(functions_of_stages(stages))
    return _summing(name, arrays, gradient, ("factor",), body + [*map(print_call, stages)], ("g",), functions)


def _accumulate(gradient: str) -> Kernel:
    stages = [Stage(scaled, ("g",), ("g", "factor")), Stage(added, ("accumulated",), ("g", "accumulated"))]
    body = [f"float g = decode_{gradient}(gradient[i]);", "float accumulated = accumulated_all[i];"]
    body += [*map(print_call, stages), "accumulated_all[i] = accumulated;"]
    parameters = ["float *__restrict__ accumulated_all", _source(gradient), "long long size", "float factor"]
    name = f"accumulate_{gradient}"
    text = _EACH.format(name=name, parameters=", ".join(parameters), before="", body=_lines(body, 8), after="")
    return Kernel(name, text, tuple(functions_of_stages(stages)))


def _narrow() -> Kernel:
    parameters = "const float *__restrict__ values, unsigned short *__restrict__ halves, long long size"
    body = "halves[i] = encode_bfloat16(values[i]);"
    return Kernel("narrow", _EACH.format(name="narrow", parameters=parameters, before="", body=body, after=""))


def _summing(
    name: str,
    arrays: Sequence[str],
    gradient: str,
    scalars: Sequence[str],
    body: Sequence[str],
    squared: Sequence[str],
    functions: tuple[types.FunctionType, ...],
) -> Kernel:
    """Write a kernel that makes lanes of the squares of some variables, in a fixed order."""
    parameters = [*arrays, _source(gradient), "double *__restrict__ lanes", "long long size"]
    additions = [f"total_{k} += (double){value} * (double){value};" for k, value in enumerate(squared)]
    text = _SUM.format(
        name=name,
        parameters=", ".join([*parameters, *(f"float {scalar}" for scalar in scalars)]),
        grain=GRAIN,
        totals=_lines([f"double total_{k} = 0.0;" for k in range(len(squared))], 8),
        body=_lines([*body, *additions], 12),
        stores=_lines([f"lanes[{k} * count + lane] = total_{k};" for k in range(len(squared))], 8),
    )
    return Kernel(name, text, functions)


def _update_body(recipe: Recipe, gradient: str, reply: str | None) -> list[str]:
    calls = [print_call(stage) for stage in recipe.stages]
    if "gradient" in recipe.sums:
        calls.insert(len(recipe.treatment), "const float treated = g;")
    before = ["const float before = p;"] if recipe.measures else []
    body = [*_loads(recipe, recipe.slots, gradient), *before, *calls, *_stores(recipe)]
    body += [f"out[i] = encode_{reply}(p);"] if reply is not None else []
    values = {"update": "(p - before)", "param": "p", "gradient": "treated"}
    return body + [f"sum_{total} += {values[total]} * {values[total]};" for total in recipe.sums]


def _loads(recipe: Recipe, slots: Iterable[str], gradient: str) -> list[str]:
    loads = ["float p = p_all[i];", f"float g = decode_{gradient}(gradient[i]);"]
    for slot in slots:
        value = f"{recipe.slots[slot]}_all[i]"
        value = f"decode_bfloat16({value})" if slot in _rounded(recipe) else value
        loads.append(f"float {recipe.slots[slot]} = {value};")
    return loads


def _stores(recipe: Recipe) -> list[str]:
    stores = ["p_all[i] = p;"]
    for slot, variable in recipe.slots.items():
        value = "0.0f" if slot == ACCUMULATED else variable
        if slot in _rounded(recipe):
            value = f"encode_bfloat16_stochastic({variable}, seed_{variable})"
        stores.append(f"{variable}_all[i] = {value};")
    return stores


def _arrays(recipe: Recipe, slots: Iterable[str], qualifier: str) -> list[str]:
    held = {slot: "unsigned short" if slot in _rounded(recipe) else "float" for slot in slots}
    pointers = [f"{kind} *__restrict__ {recipe.slots[slot]}_all" for slot, kind in held.items()]
    return [f"{qualifier}{pointer}" for pointer in ["float *__restrict__ p_all", *pointers]]


def _source(gradient: str) -> str:
    return f"const {_STORED[gradient]} *__restrict__ gradient"


def _rounded(recipe: Recipe) -> tuple[str, ...]:
    """Return the slots that are held as bfloat16, in order."""
    return recipe.rule.slots if recipe.precision is Precision.BFLOAT16 else ()


def _lines(lines: Iterable[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)
