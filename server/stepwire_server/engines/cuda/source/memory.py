"""CUDA C that moves elements between memory and registers, four at a time where their addresses allow it.

Every byte is used once a step, so that all accesses stream: what they touch is the first to leave the caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from stepwire_server.engines.cuda.source.prelude import THREADS

__all__ = ["BLOCKS", "GRADIENTS", "LANES", "MEMORY", "STORED", "Array", "decoder", "gradient_array", "joined"]

LANES: Final = 4 * THREADS
"""Lanes of a sum of squares, of which a thread keeps four neighbours."""

STORED: Final = {"float32": "float", "bfloat16": "unsigned short", "float16": "unsigned short"}
"""C types of the wire dtypes whose elements are stored one by one."""

GRADIENTS: Final = (*STORED, "int8")
"""Wire dtypes of gradients."""


class Array(NamedTuple):
    """An array that a kernel goes through, element by element.

    Attributes:
        variable: an element; `<variable>_all` points at the first.
        kind: C type of an element.
        read: it is loaded.
        written: it is stored.
        in_blocks: it lies in blocks as they were received, is decoded as it is loaded, and needs `BLOCKS`.
    """

    variable: str
    kind: str
    read: bool = True
    written: bool = False
    in_blocks: bool = False

    @property
    def pointer(self) -> str:
        """The kernel's parameter; of blocks it points at the code of the first element."""
        if self.in_blocks:
            return f"const signed char *__restrict__ {self.variable}_codes"
        return f"{'' if self.written else 'const '}{self.kind} *__restrict__ {self.variable}_all"

    @property
    def parameter(self) -> str:
        """The parameter of a function of one element."""
        return f"{self.kind} {'&' if self.written else ''}{self.variable}"

    @property
    def places(self) -> list[str]:
        """The kernel's parameters that follow its sizes: of blocks, the place of the first element in its own."""
        return [f"long long {self.variable}_place"] if self.in_blocks else []

    @property
    def opening(self) -> list[str]:
        """Statements before everything: of blocks, what stands for `<variable>_all`."""
        if not self.in_blocks:
            return []
        first = f"{self.variable}_codes - {self.variable}_place - 4"
        return [f"const Blocks {self.variable}_all = {{{first}, {self.variable}_place}};"]


def gradient_array(dtype: str) -> Array:
    """Return the array of a gradient."""
    return Array("gradient", "float", in_blocks=True) if dtype == "int8" else Array("gradient", STORED[dtype])


def decoder(dtype: str) -> str:
    """Name the function that decodes an element of `gradient_array` once it is loaded."""
    return "decode_float32" if dtype == "int8" else f"decode_{dtype}"


def joined(lines: Iterable[str], indent: int) -> str:
    """Write lines one below the other, all but the first indented."""
    return ("\n" + " " * indent).join(lines)


# `load_rows` gives a thread four neighbours of each of some rows of `LANES` elements, as the lanes of a sum lie. `left`
# counts the elements from `from` on. Loads that do not wait for one another stand together, apart from the paths for
# short and for unaligned rows. So all loads of a thread are under way before the first is used.
#
# `fold_lanes` adds the lanes of a block of threads in the order of `numba_source`. Lane j of 1024 goes into lane j mod
# 32, and the 32 are added in order. All threads call it; its first barrier keeps the calls of one kernel apart.
MEMORY: Final = """\
template <class T> struct Four;
template <> struct Four<float> { typedef float4 type; };
template <> struct Four<unsigned short> { typedef ushort4 type; };
template <> struct Four<unsigned char> { typedef uchar4 type; };

template <class T> __device__ __forceinline__ bool aligned(const T *at) {
    return ((unsigned long long)at & (4 * sizeof(T) - 1)) == 0;
}

template <class T> __device__ __forceinline__ void load_one(const T *from, T *to) { to[0] = __ldcs(from); }

template <class T> __device__ __forceinline__ void store_one(T *to, const T *from) { __stcs(to, from[0]); }

template <class T> __device__ __forceinline__ void load_four(const T *from, T *to) {
    const typename Four<T>::type four = __ldcs((const typename Four<T>::type *)from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
}

template <class T> __device__ __forceinline__ void store_four(T *to, const T *from) {
    typename Four<T>::type four;
    four.x = from[0];
    four.y = from[1];
    four.z = from[2];
    four.w = from[3];
    __stcs((typename Four<T>::type *)to, four);
}

template <int ROWS, class T> __device__ __forceinline__ void load_rows(const T *from, T *to, int left, bool vectors) {
    if (vectors && left >= LANES * (ROWS - 1) + 4) {
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) load_four(from + LANES * row, to + 4 * row);
    } else {
        #pragma unroll
        for (int k = 0; k < 4 * ROWS; ++k) {
            const int place = LANES * (k / 4) + k % 4;
            to[k] = place < left ? from[place] : (T)0;
        }
    }
}

__device__ __forceinline__ void fold_lanes(const double *totals, double *lanes, double *sum) {
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < 4; ++k) lanes[4 * threadIdx.x + k] = totals[k];
    __syncthreads();
    if (threadIdx.x < 32) {
        double total = lanes[threadIdx.x];
        for (int term = 1; term < 32; ++term) total += lanes[32 * term + threadIdx.x];
        lanes[threadIdx.x] = total;
        __syncwarp();
        if (threadIdx.x == 0) {
            for (int lane = 1; lane < 32; ++lane) total += lanes[lane];
            *sum = total;
        }
    }
}
""".replace("LANES", str(LANES))

# `stepwire.wire.int8_blocks` in CUDA C. `Blocks` stands for a pointer to an element where there is none, with the same
# functions. Four neighbours from a multiple of four on have one word of codes and one maximum, which is that of most of
# a warp. Decoding begins after all loads are under way.
BLOCKS: Final = """\
struct Blocks {
    const signed char *first;
    long long place;
};

__device__ __forceinline__ Blocks operator+(Blocks from, long long elements) {
    return {from.first, from.place + elements};
}

__device__ __forceinline__ const signed char *code_of(Blocks at) {
    return at.first + 4 * (at.place / 256) + 4 + at.place;
}

__device__ __forceinline__ float absmax_at(Blocks at) {
    return __ldcs((const float *)(at.first + at.place / 256 * 260));
}

__device__ __forceinline__ bool aligned(Blocks at) { return (at.place & 3) == 0; }

__device__ __forceinline__ void decode_four(uchar4 codes, float absmax, float *to) {
    const float scale = absmax / 127.0f;
    to[0] = (float)(signed char)codes.x * scale;
    to[1] = (float)(signed char)codes.y * scale;
    to[2] = (float)(signed char)codes.z * scale;
    to[3] = (float)(signed char)codes.w * scale;
}

__device__ __forceinline__ void load_one(Blocks from, float *to) {
    const signed char code = __ldcs(code_of(from));
    to[0] = (float)code * (absmax_at(from) / 127.0f);
}

__device__ __forceinline__ void load_four(Blocks from, float *to) {
    const uchar4 codes = __ldcs((const uchar4 *)code_of(from));
    decode_four(codes, absmax_at(from), to);
}

template <int ROWS> __device__ __forceinline__ void load_rows(Blocks from, float *to, int left, bool vectors) {
    if (vectors && left >= LANES * (ROWS - 1) + 4) {
        uchar4 codes[ROWS];
        float absmax[ROWS];
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            codes[row] = __ldcs((const uchar4 *)code_of(from + LANES * row));
            absmax[row] = absmax_at(from + LANES * row);
        }
        #pragma unroll
        for (int row = 0; row < ROWS; ++row) decode_four(codes[row], absmax[row], to + 4 * row);
    } else {
        #pragma unroll
        for (int k = 0; k < 4 * ROWS; ++k) {
            const int place = LANES * (k / 4) + k % 4;
            to[k] = 0.0f;
            if (place < left) load_one(from + place, to + k);
        }
    }
}
""".replace("LANES", str(LANES))
