"""CUDA C run on the processor: a header that names the threads, g++, and a stand-in for CuPy over both.

The threads of a block are contexts of one thread of the processor, which a barrier switches; blocks run one after
another. The stand-in accepts only what the engine may ask of CuPy, and checks it as CuPy does.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import pathlib
import re
import shutil
import subprocess
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

COMPILER = shutil.which("g++")

HEADER = r"""
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <utility>
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static thread_local
struct Index { unsigned x, y, z; };
static thread_local Index gridDim, blockDim, blockIdx, threadIdx;
static inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

static constexpr unsigned MOST_THREADS = 1024, STACK_BYTES = 1 << 15;
static thread_local ucontext_t scheduler, contexts[MOST_THREADS];
static thread_local unsigned ended;
static thread_local void (*body)(void *);
static thread_local void *call;
static void enter() { body(call); ++ended; }
static inline void __syncthreads() { swapcontext(&contexts[threadIdx.x], &scheduler); }

// Rounds, in each of which every thread reaches the next barrier, or every thread its end.
static void run_block(unsigned threads, char *stacks) {
    for (unsigned t = 0; t < threads; ++t) {
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks + t * STACK_BYTES;
        contexts[t].uc_stack.ss_size = STACK_BYTES;
        contexts[t].uc_link = &scheduler;
        makecontext(&contexts[t], enter, 0);
    }
    for (ended = 0; ended == 0;)
        for (unsigned t = 0; t < threads; ++t) {
            threadIdx = {t, 0, 0};
            swapcontext(&scheduler, &contexts[t]);
        }
    if (ended != threads) std::abort();  // on a GPU the others would wait for ever
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void **arguments;
    template <std::size_t... I> void run(std::index_sequence<I...>) { kernel(*static_cast<A *>(arguments[I])...); }
    static void enter(void *self) { static_cast<Call *>(self)->run(std::index_sequence_for<A...>()); }
};
template <class... A>
static void launch(void (*kernel)(A...), unsigned blocks, unsigned threads, void **arguments) {
    if (threads > MOST_THREADS) std::abort();
    Call<A...> made{kernel, arguments};
    body = Call<A...>::enter;
    call = &made;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    std::unique_ptr<char[]> stacks(new char[threads * STACK_BYTES]);
    for (unsigned b = 0; b < blocks; ++b) {
        blockIdx = {b, 0, 0};
        run_block(threads, stacks.get());
    }
}
"""

LAUNCHER = """
extern "C" void launch_{name}(unsigned blocks, unsigned threads, void **arguments) {{
    launch({name}, blocks, threads, arguments);
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


def _load(source: str, directory: pathlib.Path) -> tuple[ctypes.CDLL, list[str]]:
    names = re.findall(r'extern "C" __global__ void (\w+)\(', source)
    text = HEADER + source + "".join(LAUNCHER.format(name=name) for name in names)
    stem = directory / f"cuda_shim_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not stem.with_suffix(".so").exists():
        stem.with_suffix(".cc").write_text(text)
        command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", "-ffp-contract=off"]
        command += ["-fPIC", "-shared", "-o", str(stem.with_suffix(".tmp")), str(stem.with_suffix(".cc"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        stem.with_suffix(".tmp").replace(stem.with_suffix(".so"))
    return ctypes.CDLL(str(stem.with_suffix(".so"))), names


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


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""


class FakeArray:
    """One-dimensional device memory; nothing but these methods reaches it."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    dtype = property(lambda self: self.host.dtype)
    nbytes = property(lambda self: self.host.nbytes)

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key: slice) -> FakeArray:
        assert isinstance(key, slice)
        return FakeArray(self.host[key])

    def fill(self, value: float) -> None:
        self.host[...] = value

    def set(self, values: np.ndarray) -> None:
        if values.dtype != self.dtype:
            raise TypeError(f"{values.dtype} array cannot be set to {self.dtype} array")
        if values.shape != self.host.shape:
            raise ValueError("Shape mismatch")
        self.host[...] = values

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return self.host.copy()
        if out.dtype != self.dtype:
            raise TypeError(f"unable to cast array of {out.dtype} to array of {self.dtype}")
        if out.shape != self.host.shape or not out.flags.c_contiguous:
            raise ValueError("shape mismatch, or out is not contiguous")
        out[...] = self.host
        return out


class FakeCupy(types.SimpleNamespace):
    """The parts of CuPy that the engine uses.

    Attributes:
        directory: where compiled modules are kept.
        devices: how many GPUs to pretend.
        memory_bytes: what fits into one of them at once.
        broken_compiler: every compilation fails, as without NVRTC.
        library: kernels to use instead of compiling the modules asked for.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        devices: int = 2,
        memory_bytes: int = 1 << 30,
        broken_compiler: bool = False,
        library: Library | None = None,
    ) -> None:
        super().__init__()
        self.directory = directory
        self.library = library
        self.memory_bytes = memory_bytes
        self.broken_compiler = broken_compiler
        self.compiled: list[str] = []
        self.freed = 0
        self.used_bytes = 0
        self.current = threading.local()
        self.cuda = types.SimpleNamespace(
            is_available=lambda: devices > 0,
            runtime=types.SimpleNamespace(
                getDeviceCount=lambda: devices, getDeviceProperties=lambda index: {"name": b"Pretended GPU"}
            ),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: types.SimpleNamespace(synchronize=self.require_device),
            Device=self._device,
        )

    @contextlib.contextmanager
    def _using(self, index: int) -> Any:
        before = getattr(self.current, "index", None)
        self.current.index = index
        try:
            yield
        finally:
            self.current.index = before

    def _device(self, index: int) -> Any:
        device = self._using(index)
        device.mem_info = (self.memory_bytes, self.memory_bytes)  # type: ignore[attr-defined]
        return device

    def require_device(self) -> None:
        assert getattr(self.current, "index", None) is not None, "no device is current in this thread"

    def empty(self, size: int, dtype: Any) -> FakeArray:
        self.require_device()
        nbytes = size * np.dtype(dtype).itemsize
        if self.used_bytes + nbytes > self.memory_bytes:
            raise OutOfMemoryError(
                f"Out of memory allocating {nbytes} bytes (allocated so far: {self.used_bytes} bytes)"
            )
        host = np.full(size, 77, dtype)
        self.used_bytes += nbytes
        weakref.finalize(host, self._release, nbytes)
        return FakeArray(host)

    def _release(self, nbytes: int) -> None:
        self.used_bytes -= nbytes

    def zeros(self, size: int, dtype: Any) -> FakeArray:
        array = self.empty(size, dtype)
        array.host[...] = 0
        return array

    def get_default_memory_pool(self) -> Any:
        def free_all_blocks() -> None:
            self.require_device()
            self.freed += 1

        return types.SimpleNamespace(free_all_blocks=free_all_blocks)

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        assert options == ("--fmad=false",)
        return FakeModule(self, code)


class FakeModule:
    """As `cupy.RawModule`."""

    def __init__(self, cupy: FakeCupy, code: str) -> None:
        self._cupy = cupy
        self._code = code

    def compile(self) -> None:
        self._cupy.require_device()
        if self._cupy.broken_compiler:
            raise RuntimeError("CuPy failed to load libnvrtc.so.13")
        self._cupy.compiled.append(self._code)
        self._library = self._cupy.library or Library(self._code, self._cupy.directory)

    def get_function(self, name: str) -> Callable[..., None]:
        assert name in self._library.names
        return functools.partial(self._launch, name)

    def _launch(self, name: str, grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        self._cupy.require_device()
        assert isinstance(arguments, tuple) and grid[0] >= 1 and len(grid) == len(block) == 1
        unpacked = tuple(item.host if isinstance(item, FakeArray) else item for item in arguments)
        assert all(item.flags.aligned for item in unpacked if isinstance(item, np.ndarray))
        self._library.launch(name, grid[0], block[0], unpacked)
