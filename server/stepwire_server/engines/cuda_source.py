"""CUDA C from a rule's Python function: decode + rule + encode in one kernel.

The text needs no header, so that NVRTC, nvcc and a C++ compiler with a small shim all take it. Compiled with
`COMPILE_OPTIONS` (no fused multiply-add; division, square root and subnormals are IEEE by default), the kernels give
the CPU engine's bits: `a*b + c` rounds twice on both. Memory bounds the pass either way.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepwire_server.engines.cuda_printer import print_function
from stepwire_server.engines.rule_source import arguments_of, functions_of, kernel_name
from stepwire_server.rules import Rule

__all__ = ["COMPILE_OPTIONS", "sum_module", "update_module"]

COMPILE_OPTIONS = ("--fmad=false",)

# C types of the wire dtypes as stored.
_STORED = {"float32": "float", "bfloat16": "unsigned short", "float16": "unsigned short"}

# The codecs of `numba_codecs`, and a maximum that keeps NaN as NumPy's does.
_CODECS = """\
__device__ __forceinline__ float maximum(float a, float b) { return a >= b || a != a ? a : b; }

__device__ __forceinline__ float decode_float32(float value) { return value; }

__device__ __forceinline__ float encode_float32(float value) { return value; }

__device__ __forceinline__ float decode_bfloat16(unsigned short half) {
    return __uint_as_float((unsigned int)half << 16);
}

__device__ __forceinline__ unsigned short encode_bfloat16(float value) {
    unsigned int bits = __float_as_uint(value);
    unsigned int rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (unsigned short)((value != value ? bits | 0x400000u : rounded) >> 16);
}

__device__ __forceinline__ float decode_float16(unsigned short half) {
    unsigned int magnitude = half & 0x7FFFu;
    unsigned int subnormal = __float_as_uint((float)magnitude * (1.0f / 16777216.0f));
    unsigned int normal = (magnitude << 13) + (magnitude < 0x7C00u ? 0x38000000u : 0x70000000u);
    return __uint_as_float((magnitude < 0x0400u ? subnormal : normal) | (half & 0x8000u) << 16);
}

__device__ __forceinline__ unsigned short encode_float16(float value) {
    unsigned int bits = __float_as_uint(value);
    unsigned int magnitude = bits & 0x7FFFFFFFu;
    unsigned int subnormal = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
    unsigned int normal = (magnitude - 0x37FFF001u + ((magnitude >> 13) & 1u)) >> 13;
    unsigned int special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    unsigned int half = magnitude < 0x38800000u ? subnormal : magnitude < 0x47800000u ? normal : special;
    return (unsigned short)(half | (bits >> 16 & 0x8000u));
}
"""

_UPDATE = """
extern "C" __global__ void {name}({parameters}) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {{
        {statements}
    }}
}}
"""

# A thread is a lane of a block of 65,536 elements: the order of additions is that of `numba_source`. Accumulating
# in double is the contract of `sum_of_squares`; one multiply and one add an element stay below the cost of loading
# it even where double runs at 1/64 of the speed of float.
_SUM = """
extern "C" __global__ void sum_lanes_{gradient}(
    const {stored} *__restrict__ gradient, double *__restrict__ lanes, long long size) {{
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long count = (size + 65535) / 65536 * 1024;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {{
        const long long begin = i / 1024 * 65536;
        const long long end = begin + 65536 < size ? begin + 65536 : size;
        double total = 0.0;
        for (long long j = begin + i % 1024; j < end; j += 1024) {{
            const double value = decode_{gradient}(gradient[j]);
            total += value * value;
        }}
        lanes[i] = total;
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


def update_module(kernels: Iterable[tuple[Rule, str, str | None]]) -> str:
    """Write one module with the fused kernels of these rules, gradient dtypes and reply dtypes (or None).

    The kernel `kernel_name(…)` takes pointers to the parameters, the rule's slots, the gradient and, unless reply is
    None, the answer, each at its first element; then the size as int64 and the rule's scalars as float32.
    """
    functions, texts = {}, []
    for rule, gradient, reply in kernels:
        names = arguments_of(rule)
        for function in functions_of(rule.update):
            results = (names.parameter, *names.slots) if function is rule.update else ()
            functions[function.__name__] = print_function(function, results)
        texts.append(_update_kernel(rule, gradient, reply))
    return "\n".join([_CODECS, *functions.values(), *texts])


def sum_module() -> str:
    """Write the module of sums of squares: `sum_lanes_<dtype>` for each wire dtype, and `fold`.

    `sum_lanes(gradient, lanes, size)` makes 1024 sums of each block of 65,536 elements, the last perhaps shorter.
    `fold(values, sums, width, size)` adds each 32 values that lie `width` apart; first with width 32 and then with
    width 1, it leaves one sum a block. Sizes and widths are int64, sums float64.
    """
    lanes = [_SUM.format(gradient=gradient, stored=stored) for gradient, stored in _STORED.items()]
    return "\n".join([_CODECS, *lanes, _FOLD])


def _update_kernel(rule: Rule, gradient: str, reply: str | None) -> str:
    names = arguments_of(rule)
    state = (names.parameter, *names.slots)
    parameters = [f"float *__restrict__ {name}_all" for name in state]
    parameters += [f"const {_STORED[gradient]} *__restrict__ gradient"]
    stores = [f"{name}_all[i] = {name};" for name in state]
    if reply is not None:
        parameters += [f"{_STORED[reply]} *__restrict__ out"]
        stores += [f"out[i] = encode_{reply}({names.parameter});"]
    parameters += ["long long size", *(f"float {name}" for name in names.scalars)]
    loads = [f"float {name} = {name}_all[i];" for name in state]
    arguments = [names.parameter, f"decode_{gradient}(gradient[i])", *names.slots, *names.scalars, *state]
    return _UPDATE.format(
        name=kernel_name(rule, gradient, reply),
        parameters=", ".join(parameters),
        statements="\n        ".join([*loads, f"{rule.update.__name__}({', '.join(arguments)});", *stores]),
    )
