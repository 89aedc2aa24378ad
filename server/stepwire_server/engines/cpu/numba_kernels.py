"""Kernels for the CPU, compiled by Numba and kept for later processes.

Kept results have neither fast-math nor a fused multiply-add. The loops vectorise as well without, because memory is the
limit. An update gives the same bits wherever a range is split, for any alignment and any processor, and in NumPy too.
The kernels are serial and release the GIL. Numba's own parallel loops abort the process when two threads enter one at
once, by its default threading layer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import numba
import numba.core.codegen
import numba.core.types as numba_types
import numpy as np

from stepwire_server.engines.compiled.cache import kernel_directory, store
from stepwire_server.engines.compiled.levels import aim
from stepwire_server.engines.compiled.stock import fill, stocked_level
from stepwire_server.engines.cpu.numba_exact import exact_source
from stepwire_server.engines.cpu.numba_helpers import shared_helper
from stepwire_server.engines.cpu.numba_lane import exchange_source, lane_source
from stepwire_server.engines.cpu.numba_module import HELPER_OPTIONS, KERNEL_OPTIONS, MEASURING_OPTIONS
from stepwire_server.engines.cpu.numba_rows import rows_source
from stepwire_server.engines.cpu.numba_source import (
    accumulate_source,
    measure_source,
    seeds_of,
    sum_source,
    update_source,
)
from stepwire_server.engines.cpu.numba_table import table_source
from stepwire_server.engines.cpu.numba_words import exchange
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.payloads import STORED, bits_of, name_of
from stepwire_server.engines.protocol import HostArray
from stepwire_server.rules import Precision, Recipe

__all__ = ["NumbaKernels", "is_disabled"]

_log = logging.getLogger(__name__)

_FLOATS = numba_types.Array(numba_types.float32, 1, "C")
_BITS = numba_types.Array(numba_types.uint16, 1, "C")
_CODES = numba_types.Array(numba_types.uint8, 1, "C")
_SUMS = numba_types.Array(numba_types.float64, 1, "C")
_ROWS = numba_types.Array(numba_types.int64, 1, "C")
_KINDS = numba_types.Array(numba_types.int32, 1, "C")
_FLAGS = numba_types.Array(numba_types.boolean, 1, "C")
_SCALARS = numba_types.Array(numba_types.float32, 2, "C")
_PARTIALS = numba_types.Array(numba_types.float64, 2, "C")


class NumbaKernels:
    """Compiled kernels, made when first asked for. Thread-safe.

    Kernels have whole arrays and offsets as arguments, because slicing in Python costs more than a small step. Offsets
    and sizes are ints, scalars are floats.
    """

    def __init__(self, directory: pathlib.Path | None = None) -> None:
        """Keep generated files in `directory`; None for the user's kernel cache, with what was compiled ahead."""
        self._directory = directory or _stocked_directory()
        prefer_wide_vectors()
        self._built: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._room: KernelRoom | None = None
        self._lock = threading.Lock()

    def bound(self, room: KernelRoom) -> None:
        """Have kernels admitted to a room before they are made."""
        self._room = room

    # Every gradient and reply is declared unaligned, so that one compiled kernel serves them all. Vector loads cost the
    # same, and a chunk at an odd offset of a message needs no copy.

    def source(self, payload: HostArray) -> HostArray:
        """View a chunk of any wire dtype as the kernels read it."""
        view = bits_of(payload)
        view.setflags(write=False, align=False)
        return view

    def target(self, out: HostArray) -> HostArray:
        """View an array of any wire dtype as the kernels write it."""
        view = bits_of(out)
        view.setflags(align=False)
        return view

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, out, start, begin, first, size[, sums], *seeds, *scalars)`.

        It steps `param[start:start + size]` with `gradient[begin:begin + size]` and encodes into
        `out[first:first + size]`; out is None when reply is. A recipe that measures adds to `sums`. The seeds are
        one int in [0, 2³²) for each slot held as bfloat16. A slot held in 8 bits is two arrays, codes and maxima;
        `start` is then a multiple of 256.
        """
        key = (*recipe.key, gradient, reply)
        return self._built.get(key) or self._build(key, lambda: self._update(recipe, gradient, reply))

    def sum_of_squares(self, gradient: np.dtype[Any], accumulated: bool) -> Callable[..., None]:
        """Return `kernel([accumulated,] gradient, start, begin, first, size, block, partials, factor)`.

        The range begins at `begin` of the gradient and at `start` of `accumulated`. The kernel sums its elements
        `[first, first + size)` in blocks of `block`, and writes each sum to `partials[0, index of the block]`. `first`
        is a multiple of `block`.
        """
        key = ("sum_of_squares", gradient, accumulated)
        return self._built.get(key) or self._build(key, lambda: self._sum_of_squares(gradient, accumulated))

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, start, begin, first, size, block, partials, *scalars but the last)`.

        As `sum_of_squares`; `partials[0]` is of the parameters, `partials[1]` of the rule's direction.
        """
        key = ("measure", *recipe.key, gradient)
        return self._built.get(key) or self._build(key, lambda: self._measure(recipe, gradient))

    def accumulate(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(accumulated, gradient, start, begin, size, factor)`."""
        key = ("accumulate", gradient)
        return self._built.get(key) or self._build(key, lambda: self._accumulate(gradient))

    def exact(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., Any]:
        """See `CpuKernels.exact`."""
        key = ("exact", work, gradient)
        return self._built.get(key) or self._build(key, lambda: self._exact(work, gradient))

    def rows(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., None]:
        """See `CpuKernels.rows`."""
        key = ("rows", work, gradient)
        return self._built.get(key) or self._build(key, lambda: self._rows(work, gradient))

    def table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> Callable[..., None]:
        """See `CpuKernels.table`."""
        key = ("table", *recipe.key, reply)
        return self._built.get(key) or self._build(key, lambda: self._table(recipe, reply))

    def lane(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Make the loop of a compiled lane, `numba_lane_functions.run`; the caller keeps it.

        It is made without the lock of the other kernels, for which steps may wait.

        Raises:
            ResourceExhaustedError: there is no room for one more kernel.
        """
        update, squares = self.update(recipe, gradient, reply), self.sum_of_squares(gradient, False)
        name = f"lane_{recipe.name}_{name_of(gradient)}_to_{reply.name if reply is not None else 'nothing'}"
        modules = [str(kernel.py_func.__module__) for kernel in (update, squares)]  # type: ignore[attr-defined]
        text = lane_source(recipe, name, name_of(gradient), None if reply is None else reply.name, modules)
        beside = {"update": update, "sum_of_squares": squares, "lane_helper": numba.njit(**HELPER_OPTIONS)}
        with contextlib.nullcontext() if self._room is None else self._room.admitted():
            return self._compile(name, text, (*[numba_types.int64] * 4, numba_types.float64), beside)

    def exchange(self) -> Callable[[int, int, int], bool]:
        """Return `exchange(address, expected, value)` of `numba_words`."""
        name, beside = "exchange_words", {"exchange": exchange}
        key, signature = (name,), (numba_types.int64,) * 3
        return self._built.get(key) or self._build(  # type: ignore[return-value]
            key, lambda: self._compile(name, exchange_source(name), signature, beside)
        )

    def _build(self, key: tuple[Any, ...], compile_kernel: Callable[[], Callable[..., None]]) -> Callable[..., None]:
        with self._lock:
            if key not in self._built:
                with contextlib.nullcontext() if self._room is None else self._room.admitted():
                    self._built[key] = compile_kernel()
            return self._built[key]

    def _update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        name = f"{recipe.name}_{name_of(gradient)}_to_{reply.name if reply is not None else 'nothing'}"
        text = update_source(recipe, name, name_of(gradient), None if reply is None else reply.name)
        signature = (
            *_state_types(recipe),
            _source_type(gradient),
            _target_type(reply),
            *[numba_types.intp] * 4,
            *([_SUMS] if recipe.measures else []),
            *[numba_types.int64] * len(seeds_of(recipe)),
            *[numba_types.float64] * len(recipe.scalars),
        )
        return self._compile(name, text, signature)

    def _sum_of_squares(self, gradient: np.dtype[Any], accumulated: bool) -> Callable[..., None]:
        dtype = name_of(gradient)
        name = f"sum_of_squares_{dtype}" + ("_accumulated" if accumulated else "")
        arrays: list[Any] = [_FLOATS] if accumulated else []
        return self._compile(name, sum_source(name, dtype, accumulated), _sum_signature(arrays, gradient, 1))

    def _measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Callable[..., None]:
        name = f"measure_{recipe.name}_{name_of(gradient)}"
        signature = _sum_signature(_state_types(recipe), gradient, len(recipe.scalars) - 1)
        return self._compile(name, measure_source(recipe, name, name_of(gradient)), signature)

    def _accumulate(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        name = f"accumulate_{name_of(gradient)}"
        signature = (_FLOATS, _source_type(gradient), *[numba_types.intp] * 3, numba_types.float64)
        return self._compile(name, accumulate_source(name, name_of(gradient)), signature)

    def _exact(self, work: str, gradient: np.dtype[Any] | None) -> Callable[..., Any]:
        name = f"exact_{work}" + ("" if gradient is None else f"_{name_of(gradient)}")
        integers, source = [numba_types.intp] * 3, () if gradient is None else (_source_type(gradient),)
        signatures: dict[str, tuple[Any, ...]] = {
            "store": (_SUMS, *source, *integers, numba_types.float64),
            "add": (_SUMS, *source, _SUMS, *integers, numba_types.float64, numba_types.intp),
            "carry": (_SUMS, _SUMS),
            "odd": (_SUMS, _SUMS),
            "mean": (_SUMS, _FLOATS, *integers[:2], *[numba_types.float64] * 2),
            "lines": (_SUMS, numba_types.intp, *[_ROWS] * 3, _SUMS, _FLAGS),
        }
        text = exact_source(work, name, None if gradient is None else name_of(gradient))
        return self._compile(name, text, signatures[work])

    def _rows(self, work: str, gradient: np.dtype[Any] | None) -> Callable[..., None]:
        name = f"rows_{work}" + ("" if gradient is None else f"_{name_of(gradient)}")
        integers = [numba_types.intp] * 3
        if gradient is None:
            pairs, rows = numba_types.Array(numba_types.intp, 2, "C"), numba_types.Array(numba_types.float32, 2, "C")
            return self._compile(name, rows_source(work, name, None), (rows, pairs, rows, *integers))
        signature = (_FLOATS, _source_type(gradient), *integers, numba_types.float64)
        return self._compile(name, rows_source(work, name, name_of(gradient)), signature)

    def _table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> Callable[..., None]:
        name = f"rows_{recipe.name}_to_{reply.name if reply is not None else 'nothing'}"
        gradient = _source_type(np.dtype(np.float32))
        arrays = (*_state_types(recipe), gradient, _ROWS, _KINDS, _SCALARS, _target_type(reply))
        text = table_source(recipe, name, None if reply is None else reply.name)
        return self._compile(name, text, (*arrays, *[numba_types.intp] * 5, _SUMS))

    def _compile(
        self, name: str, text: str, signature: tuple[Any, ...], beside: Mapping[str, Any] | None = None
    ) -> Callable[..., None]:
        """Load the kernel's machine code, or make it; a full disk or a damaged cache costs time, not the step.

        `beside` is what the module has beside its text.
        """
        load = functools.partial(_load, name=name, text=text, signature=signature, beside=beside or {})
        started = time.perf_counter()
        try:
            kernel = load(store(self._directory, name, text), cache=True)
        except Exception as problem:  # a torn pickle raises anything; a kernel that does not compile raises again
            _log.warning("kernel %s is not cached in %s: %r", name, self._directory, problem)
            kernel = load(self._directory / f"{name}.py", cache=False)
        _log.debug("kernel %s ready in %.3f s", name, time.perf_counter() - started)
        return kernel


def _stocked_directory() -> pathlib.Path:
    """Return the user's kernel cache; where kernels were compiled ahead, that of their level, and compile for it."""
    directory = kernel_directory()
    if (stocked := stocked_level()) is None:
        return directory
    level, stock = stocked
    aim(level)
    # Numba writes an index of another version of its own anew, so a cache that outlives an image is one a version.
    directory /= f"{level.name}-numba-{numba.__version__}"
    fill(directory, stock)
    return directory


def is_disabled() -> bool:
    """Tell whether NUMBA_DISABLE_JIT is set: Numba then compiles nothing, and its functions are Python's."""
    settings: Any = numba.config
    return bool(settings.DISABLE_JIT)


def prefer_wide_vectors() -> None:
    """Let the compiler use all of AVX-512 where the processor has it; on most it prefers half.

    The passes over 8-bit and bfloat16 moments are bound by arithmetic and gain; the others wait for memory either way.
    Numba reads this setting for the whole process, and only before it first compiles. NUMBA_CPU_FEATURES comes before
    it. Results do not change: no operation is reordered.
    """
    settings: Any = numba.config
    codegen: Any = numba.core.codegen
    if settings.CPU_FEATURES is None:
        features = codegen.get_host_cpu_features()
        if "+avx512f" in features.split(","):
            settings.CPU_FEATURES = f"{features},-prefer-256-bit"


def _load(
    path: pathlib.Path, *, name: str, text: str, signature: tuple[Any, ...], beside: Mapping[str, Any], cache: bool
) -> Callable[..., None]:
    """Execute the module's text under the name of its file, which Numba stamps its cache with."""
    module = types.ModuleType(f"stepwire_kernel_{path.stem}")
    sys.modules[module.__name__] = module  # where Numba looks when it loads machine code
    module.__dict__.update(beside, helper=shared_helper)
    module.__dict__["kernel"] = numba.njit(**KERNEL_OPTIONS, cache=cache)
    module.__dict__["measuring_kernel"] = numba.njit(**MEASURING_OPTIONS, cache=cache)
    exec(compile(text, str(path), "exec"), module.__dict__)
    kernel = getattr(module, name)
    kernel.compile(signature)
    kernel.disable_compile()  # arguments of other types are a bug, not a reason to compile within a step
    return kernel  # type: ignore[no-any-return]


def _state_types(recipe: Recipe) -> list[Any]:
    held: dict[Precision, list[Any]] = {
        Precision.FLOAT32: [_FLOATS],
        Precision.BFLOAT16: [_BITS],
        Precision.INT8: [_CODES, _FLOATS],
    }
    types: list[Any] = [_FLOATS]
    for slot in recipe.slots:
        types += held[recipe.precision] if slot in recipe.rule.slots else [_FLOATS]
    return types


def _sum_signature(arrays: list[Any], gradient: np.dtype[Any], scalars: int) -> tuple[Any, ...]:
    integers, floats = [numba_types.intp] * 5, [numba_types.float64] * scalars
    return (*arrays, _source_type(gradient), *integers, _PARTIALS, *floats)


def _source_type(dtype: np.dtype[Any]) -> numba_types.Array:
    stored = numba.from_dtype(STORED[dtype])
    return numba_types.Array(stored, 1, "C", readonly=True, aligned=False)


def _target_type(dtype: np.dtype[Any] | None) -> numba_types.Type:
    if dtype is None:
        return numba_types.none
    return numba_types.Array(numba.from_dtype(STORED[dtype]), 1, "C", aligned=False)
