"""CUDA C run on the processor: a header that names the threads, and g++.

The threads of a block are contexts of one thread of the processor, which barriers and shuffles switch; blocks run one
after another. Vectors that are not aligned, and threads that would wait for ever, abort with a message.

The header is C but for a few templates, because reading the headers of C++ lasts longer than compiling a kernel.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np

COMPILER = shutil.which("g++")

# Compiling lasts longer than what the tests run. An optimizer sees more of what is not initialised, so CI has one.
OPTIMIZATION = "-O1" if os.environ.get("CI") == "true" else "-O0"

HEADER = r"""
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
struct Index { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
static thread_local Index gridDim, blockDim, blockIdx, threadIdx;
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }

[[noreturn]] static void fail(const char *what) {
    fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
    abort();
}
template <class T> static inline T __ldcs(const T *from) {
    if ((size_t)from % sizeof(T)) fail("a load is not aligned");
    T value;
    memcpy(&value, (const void *)from, sizeof(T));
    return value;
}
template <class T> static inline void __stcs(T *to, T value) {
    if ((size_t)to % sizeof(T)) fail("a store is not aligned");
    memcpy((void *)to, &value, sizeof(T));
}

static constexpr unsigned WARP = 32, MOST_THREADS = 1024, STACK_BYTES = 1 << 15;
enum Stop { AT_BLOCK, AT_WARP, AT_END };

// A context goes round a loop for as long as its thread of the processor lives: a thread of a block each turn. Jumps
// make no system call, unlike the functions of ucontext, which a context needs for its first turn alone.
struct Stacks {
    char *memory = (char *)malloc(MOST_THREADS * STACK_BYTES);
    ~Stacks() { free(memory); }
};
static thread_local Stacks stacks;
static thread_local bool begun[MOST_THREADS];
static thread_local jmp_buf scheduler, contexts[MOST_THREADS];
static thread_local Stop stops[MOST_THREADS];
static thread_local void (*body)(void **);
static thread_local void **call;
static inline void stop(Stop at) {
    stops[threadIdx.x] = at;
    if (!_setjmp(contexts[threadIdx.x])) _longjmp(scheduler, 1);
}
static void turns() {
    for (;;) {
        body(call);
        stop(AT_END);
    }
}
static void resume(unsigned t) {
    threadIdx = {t, 0, 0};
    if (_setjmp(scheduler)) return;
    if (begun[t]) _longjmp(contexts[t], 1);
    begun[t] = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = stacks.memory + t * STACK_BYTES;
    first.uc_stack.ss_size = STACK_BYTES;
    first.uc_link = nullptr;
    makecontext(&first, turns, 0);
    setcontext(&first);
}
static inline void __syncthreads() { stop(AT_BLOCK); }
static inline void __syncwarp() { stop(AT_WARP); }

// Two places a thread, in turn: while one lane writes what it exchanges next, others still read the last.
static thread_local unsigned exchanged[2][MOST_THREADS], exchanges[MOST_THREADS];
static inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lane_mask) {
    const unsigned me = threadIdx.x, turn = exchanges[me]++ % 2;
    if (mask != 0xFFFFFFFFu || me / WARP * WARP + WARP > blockDim.x) fail("a shuffle without all lanes");
    exchanged[turn][me] = value;
    stop(AT_WARP);
    return exchanged[turn][me ^ (unsigned)lane_mask];
}

// Rounds, in each of which every thread of a warp reaches the same kind of stop; a warp that waits for its own lanes
// goes on alone.
static Stop run_warp(unsigned first, unsigned end) {
    do
        for (unsigned t = first; t < end; ++t) {
            resume(t);
            if (stops[t] != stops[first]) fail("lanes of a warp wait for one another in vain");
        }
    while (stops[first] == AT_WARP);
    return stops[first];
}
static void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) exchanges[t] = 0;
    for (bool goes_on = true; goes_on;)
        for (unsigned first = 0; first < threads; first += WARP) {
            const bool waits = run_warp(first, first + WARP < threads ? first + WARP : threads) == AT_BLOCK;
            if (first > 0 && waits != goes_on) fail("warps wait for one another in vain");
            goes_on = waits;
        }
}

template <int... I> struct Places {};
template <int count> using PlacesOf = Places<__integer_pack(count)...>;
template <class... A, int... I> static inline void call_with(void (*kernel)(A...), void **arguments, Places<I...>) {
    kernel(*(A *)arguments[I]...);
}
template <class... A> static inline void apply(void (*kernel)(A...), void **arguments) {
    call_with(kernel, arguments, PlacesOf<sizeof...(A)>());
}
static inline void launch(void (*kernel)(void **), unsigned blocks, unsigned threads, void **arguments) {
    if (threads > MOST_THREADS) fail("too many threads");
    body = kernel;
    call = arguments;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    for (unsigned b = 0; b < blocks; ++b) {
        blockIdx = {b, 0, 0};
        run_block(threads);
    }
}
"""

LAUNCHER = """
extern "C" void launch_{name}(unsigned blocks, unsigned threads, void **arguments) {{
    launch([](void **given) {{ apply({name}, given); }}, blocks, threads, arguments);
}}
"""


class Library:
    """Compiled modules of kernels; several are compiled at a time."""

    def __init__(self, sources: str | list[str], directory: pathlib.Path) -> None:
        sources = [sources] if isinstance(sources, str) else sources
        with concurrent.futures.ThreadPoolExecutor() as pool:
            loaded = list(pool.map(lambda source: _load(source, directory), sources))
        self._launchers = {name: getattr(library, f"launch_{name}") for library, names in loaded for name in names}
        self.names = list(self._launchers)

    def launch(self, name: str, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        """Run a kernel on NumPy arrays and NumPy scalars."""
        holders = [_holder(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(holders))(*[ctypes.addressof(holder) for holder in holders])
        self._launchers[name](blocks, threads, pointers)


@functools.cache
def _load(source: str, directory: pathlib.Path) -> tuple[ctypes.CDLL, list[str]]:
    names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', source)
    text = f"// {OPTIMIZATION}\n" + HEADER + source + "".join(LAUNCHER.format(name=name) for name in names)
    stem = directory / f"cuda_shim_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with stem.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of a run wait for what one compiles
        if not stem.with_suffix(".so").exists():
            _compile(stem, text)
    return ctypes.CDLL(str(stem.with_suffix(".so"))), names


def _compile(stem: pathlib.Path, text: str) -> None:
    stem.with_suffix(".cc").write_text(text)
    command = [
        str(COMPILER),
        "-std=c++17",
        OPTIMIZATION,
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
    ]
    command += ["-nostdinc++", "-U_FORTIFY_SOURCE"]  # which takes jumps between stacks for errors
    command += ["-fPIC", "-shared", "-o", str(stem.with_suffix(".tmp")), str(stem.with_suffix(".cc"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stem.with_suffix(".tmp").replace(stem.with_suffix(".so"))


def _holder(argument: Any) -> Any:
    match argument:
        case np.ndarray():
            return ctypes.c_void_p(argument.ctypes.data)
        case np.int64():
            return ctypes.c_longlong(int(argument))
        case np.uint32():
            return ctypes.c_uint(int(argument))
        case np.float32():
            return ctypes.c_float(float(argument))
    raise TypeError(f"{type(argument)} is no argument of a kernel")
