"""How warps go through blocks of 256 elements in 8 bits, and the kernels that convert them.

A lane holds eight elements of its warp's block in registers: two groups of four neighbours. So a warp moves whole lines
of memory. Shuffles find the largest of the block, so that a warp waits for others with the tables alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from stepwire_server.engines.cuda.source.dynamic_code import DYNAMIC_CODE, shared_tables
from stepwire_server.engines.cuda.source.memory import Array, joined
from stepwire_server.engines.cuda.source.module import Kernel
from stepwire_server.engines.cuda.source.passes import openings, preludes
from stepwire_server.engines.cuda.source.prelude import THREADS
from stepwire_server.engines.int8_moments import BLOCK, most_of

__all__ = ["BlockPass", "block_kernel", "block_kernels", "encoded"]

# Past the end of the shorter last block there are no elements. Zeros stand in for them, and are not stored.
_GROUPS: Final = """\
__device__ __forceinline__ int place(int k) { return 128 * (k / 4) + 4 * (int)(threadIdx.x % 32) + k % 4; }

template <class T> __device__ __forceinline__ void load_group(
    const T *from, T *to, int group, int count, bool whole) {
    if (whole) {
        load_four(from + place(4 * group), to);
    } else {
        #pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = place(4 * group + k) < count ? from[place(4 * group + k)] : (T)0;
    }
}

template <class T> __device__ __forceinline__ void store_group(
    T *to, const T *from, int group, int count, bool whole) {
    if (whole) {
        store_four(to + place(4 * group), from);
    } else {
        #pragma unroll
        for (int k = 0; k < 4; ++k)
            if (place(4 * group + k) < count) to[place(4 * group + k)] = from[k];
    }
}

__device__ __forceinline__ void clear_rest(float *values, int count) {
    #pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = place(k) < count ? values[k] : 0.0f;
}

__device__ __forceinline__ void decode_group(
    const unsigned char *codes, float absmax, const unsigned int *map, float *values) {
    #pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = decode_code(codes[k], absmax, map);
}

__device__ __forceinline__ unsigned int largest_of(const float *values) {
    unsigned int largest = 0u;
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
        const unsigned int magnitude = __float_as_uint(values[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const unsigned int other = __shfl_xor_sync(0xFFFFFFFFu, largest, distance);
        largest = other > largest ? other : largest;
    }
    return largest;
}
""" + "".join(
    f"""
__device__ __forceinline__ void encode_{sign}_block(
    const float *values, unsigned int largest, const unsigned int *steps, unsigned char *codes, float *absmax,
    int count, bool whole) {{
    const float own = absmax_of(largest, {most_of(sign == "signed"):#x}u), scale = scale_of(own);
    #pragma unroll
    for (int group = 0; group < 2; ++group) {{
        unsigned char four[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k) four[k] = encode_{sign}(values[4 * group + k], scale, fill_of(largest), steps);
        store_group(codes, four, group, count, whole);
    }}
    if (threadIdx.x % 32 == 0) *absmax = own;
}}
"""
    for sign in ("signed", "unsigned")
)

_RECEIVED_GROUPS: Final = """\
__device__ __forceinline__ void load_group(Blocks from, float *to, int group, int count, bool whole) {
    if (whole) {
        load_four(from + place(4 * group), to);
    } else {
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            to[k] = 0.0f;
            if (place(4 * group + k) < count) load_one(from + place(4 * group + k), to + k);
        }
    }
}
"""

# Elements that wait for the maximum stay in registers until both groups are done, and no others do. With both groups
# loaded first, kernels with many arrays spilled.
#
# The body stands there twice. In the first loop all blocks are whole and aligned, and the compiler knows: nothing is
# tested block by block. The second loop has the shorter last block, or all blocks of an array that is not aligned.
_BLOCKWISE = """{element}
extern "C" __global__ void __launch_bounds__({threads}, {resident}) {name}({parameters}) {{
    {before}
    const int warps = (int)blockDim.x / 32, warp = (int)(blockIdx.x * warps + threadIdx.x / 32);
    const int blocks = (int)((size + {width} - 1) / {width}), wholes = {aligned} ? (int)(size / {width}) : 0;
    for (int block = warp; block < wholes; block += (int)gridDim.x * warps) {{
        const long long low = {width}ll * block;
        constexpr int count = {width};
        constexpr bool whole = true;
        {body}
    }}
    for (int block = wholes + warp; block < blocks; block += (int)gridDim.x * warps) {{
        const long long low = {width}ll * block;
        const int count = size - low < {width} ? (int)(size - low) : {width};
        constexpr bool whole = false;
        {body}
    }}
    {after}
}}
"""
_BODY = """{kept}
        #pragma unroll
        for (int group = 0; group < 2; ++group) {{
            {groups}
        }}
        {closing}"""


class BlockPass(NamedTuple):
    """The work of a kernel on a block of 256 elements; each lane of a warp has two groups of four.

    Attributes:
        arrays: the arrays that the kernel goes through, of which each starts at a block.
        tables: the names of the tables that the kernel reads.
        group: the statements for each `group`, besides loading and storing `<variable>s`, four elements an array.
        kept: the declarations of the values that go from the groups to the closing.
        closing: the statements after both groups; `block` is the number of the block.
        coded: the arrays of codes, which the closing stores.
        before: the statements before everything.
        after: the statements after everything, which all threads reach.
        resident: the blocks of threads that a multiprocessor's registers suffice for at least.
    """

    arrays: Sequence[Array]
    tables: Sequence[str]
    group: Sequence[str]
    kept: Sequence[str] = ()
    closing: Sequence[str] = ()
    coded: Sequence[Array] = ()
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    resident: int = 4


def block_kernel(kernel: Kernel, parameters: Sequence[str], work: BlockPass) -> Kernel:
    """Write a kernel whose warps go through blocks of 256 elements, the last perhaps shorter.

    Args:
        kernel: the name and the functions of the kernel; its text is functions in CUDA C.
        parameters: the declarations of the parameters, among them `tables` and `size`.
        work: the work on a block.
    """
    read = [array for array in [*work.arrays, *work.coded] if array.read]
    registers = [f"{array.kind} {array.variable}s[4];" for array in dict.fromkeys([*work.arrays, *read])]
    moved = "{0}_group({1}_all + low, {1}s, group, count, whole);"
    loads = [moved.format("load", array.variable) for array in read]
    stores = [moved.format("store", array.variable) for array in work.arrays if array.written]
    body = _BODY.format(
        kept=joined(work.kept, 8),
        groups=joined([*registers, *loads, *work.group, *stores], 12),
        closing=joined(work.closing, 8),
    )
    text = _BLOCKWISE.format(
        name=kernel.name,
        threads=THREADS,
        resident=work.resident,
        element=kernel.text,
        parameters=", ".join(parameters),
        before=joined([*shared_tables(work.tables), *openings(work.arrays), *work.before], 4),
        aligned=" && ".join(f"aligned({array.variable}_all)" for array in [*work.arrays, *work.coded]),
        width=BLOCK,
        body=body,
        after=joined(work.after, 4),
    )
    received = [*preludes(work.arrays), _RECEIVED_GROUPS] if preludes(work.arrays) else []
    return kernel._replace(text=text, preludes=(DYNAMIC_CODE, _GROUPS, *received))


def encoded(sign: str, values: str, largest: str, codes: str, absmax: str) -> str:
    """Write the statement that stores a block's codes and maximum."""
    at = f"{codes} + low, {absmax} + block"
    return f"encode_{sign}_block({values}, {largest}, {sign}_steps, {at}, count, whole);"


def block_kernels() -> list[Kernel]:
    """Write the conversions of blocks of 256 elements, the last perhaps shorter, to 8 bits and back; signed and not.

    `decode_signed_blocks(codes, absmax, values, tables, size)` decodes. `encode_signed_blocks(values, codes, absmax,
    tables, size)` finds the absmax. `encode_signed_with(values, scale, codes, absmax, tables, size)` is given it by the
    scale of a block's first element, as `BlockSlot.replace` is; `unsigned` likewise. Tables are those of
    `eight_bit_tables`. Values, scale and absmax are float32, codes are uint8, and the size is int64.
    """
    kernels = []
    for sign in ("signed", "unsigned"):
        kernels += [_decode(sign), _encode(f"encode_{sign}_blocks", sign, [], "largest_of(kept)")]
        scale = "const float *__restrict__ scale"
        kernels.append(_encode(f"encode_{sign}_with", sign, [scale], "largest_given(scale[low], largest_of(kept))"))
    return kernels


def _decode(sign: str) -> Kernel:
    codes, values = Array("code", "unsigned char"), Array("value", "float", read=False, written=True)
    parameters = [codes.pointer, "const float *__restrict__ absmax", values.pointer, *_TABLES_AND_SIZE]
    group = [f"decode_group(codes, absmax[block], {sign}_map, values);"]
    return block_kernel(
        Kernel(f"decode_{sign}_blocks", ""), parameters, BlockPass([codes, values], [f"{sign}_map"], group)
    )


def _encode(name: str, sign: str, scales: list[str], largest: str) -> Kernel:
    values, codes = Array("value", "float"), Array("code", "unsigned char", read=False, written=True)
    parameters = [values.pointer, *scales, codes.pointer, "float *__restrict__ absmax", *_TABLES_AND_SIZE]
    work = BlockPass(
        [values],
        [f"{sign}_steps"],
        ["#pragma unroll", "for (int k = 0; k < 4; ++k) kept[4 * group + k] = values[k];"],
        ["float kept[8];"],
        [encoded(sign, "kept", largest, "code_all", "absmax")],
        [codes],
    )
    return block_kernel(Kernel(name, ""), parameters, work)


_TABLES_AND_SIZE = ("const unsigned int *__restrict__ tables", "long long size")
