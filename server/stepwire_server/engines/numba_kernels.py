"""Kernels for the CPU that Numba compiles: decode + rule + encode in one vectorised pass.

No `fastmath`: plain IEEE arithmetic vectorises as well here, and gives the same bits wherever a range is
split, whatever the alignment or the processor, and in NumPy too. The kernels are serial and release the GIL;
Numba's own parallel loops abort the process when two threads enter one at once (its default threading layer).
"""

from __future__ import annotations

import logging
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numba
import numba.core.types as numba_types
import numpy as np

from stepwire_server.engines.chunks import STORED, bits_of
from stepwire_server.engines.kernel_cache import kernel_directory, store
from stepwire_server.engines.numba_source import sum_name, sum_source, update_source
from stepwire_server.engines.protocol import HostArray
from stepwire_server.engines.rule_source import arguments_of, kernel_name
from stepwire_server.rules import Rule

__all__ = ["NumbaKernels"]

_log = logging.getLogger(__name__)

# Wrappers that nobody calls would double the time to compile.
_HELPER_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_KERNEL_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}

_STATE = numba_types.Array(numba_types.float32, 1, "C")
_PARTIALS = numba_types.Array(numba_types.float64, 1, "C")


class NumbaKernels:
    """Compiled kernels, made when first asked for. Thread-safe.

    Kernels take whole arrays and offsets, because slicing in Python costs more than a small step does.
    """

    def __init__(self, directory: pathlib.Path | None = None) -> None:
        """Keep generated files in `directory`; None for the user's kernel cache."""
        self._directory = directory or kernel_directory()
        self._built: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._lock = threading.Lock()

    # Gradients and replies are handed over as unaligned whatever they are, so that one compiled kernel serves
    # them all: vector loads cost the same, and a chunk at an odd offset of a message needs no copy.

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

    def update(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return `kernel(param, *slots, gradient, out, start, begin, first, size, *scalars)`.

        It steps `param[start:start + size]` with `gradient[begin:begin + size]` and encodes into
        `out[first:first + size]`; offsets are ints, scalars are floats, and out is None when reply is.
        """
        key = (rule.update, gradient, reply)
        return self._built.get(key) or self._build(key, lambda: self._update(rule, gradient, reply))

    def sum_of_squares(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return `kernel(gradient, begin, first, size, block, partials)`.

        Of the range that begins at `begin`, it sums the elements `[first, first + size)` in blocks of `block`
        and writes each sum to `partials[index of the block]`; `first` is a multiple of `block`.
        """
        key = ("sum_of_squares", gradient)
        return self._built.get(key) or self._build(key, lambda: self._sum_of_squares(gradient))

    def _build(self, key: tuple[Any, ...], compile_kernel: Callable[[], Callable[..., None]]) -> Callable[..., None]:
        with self._lock:
            if key not in self._built:
                self._built[key] = compile_kernel()
            return self._built[key]

    def _update(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        wire = (gradient.name, None if reply is None else reply.name)
        arguments = arguments_of(rule)
        signature = (
            *[_STATE] * (1 + len(arguments.slots)),
            _source_type(gradient),
            _target_type(reply),
            *[numba_types.intp] * 4,
            *[numba_types.float64] * len(arguments.scalars),
        )
        return self._compile(kernel_name(rule, *wire), update_source(rule, *wire), signature)

    def _sum_of_squares(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        signature = (_source_type(gradient), *[numba_types.intp] * 4, _PARTIALS)
        return self._compile(sum_name(gradient.name), sum_source(gradient.name), signature)

    def _compile(self, name: str, text: str, signature: tuple[Any, ...]) -> Callable[..., None]:
        """Load the kernel's machine code, or make it; a full disk or a damaged cache costs time, not the step."""
        started = time.perf_counter()
        try:
            kernel = _load(store(self._directory, name, text), name, text, signature, cache=True)
        except Exception as problem:  # a torn pickle raises anything; a kernel that does not compile raises again
            _log.warning("kernel %s is not cached in %s: %r", name, self._directory, problem)
            kernel = _load(self._directory / f"{name}.py", name, text, signature, cache=False)
        _log.debug("kernel %s ready in %.3f s", name, time.perf_counter() - started)
        return kernel


def _load(path: pathlib.Path, name: str, text: str, signature: tuple[Any, ...], cache: bool) -> Callable[..., None]:
    """Execute the module's text under the name of its file, which Numba stamps its cache with."""
    module = types.ModuleType(f"stepwire_kernel_{path.stem}")
    sys.modules[module.__name__] = module  # where Numba looks when it loads machine code
    module.__dict__["helper"] = numba.njit(**_HELPER_OPTIONS)
    module.__dict__["kernel"] = numba.njit(**_KERNEL_OPTIONS, cache=cache)
    exec(compile(text, str(path), "exec"), module.__dict__)
    kernel = getattr(module, name)
    kernel.compile(signature)
    kernel.disable_compile()  # arguments of other types are a bug, not a reason to compile within a step
    return kernel  # type: ignore[no-any-return]


def _source_type(dtype: np.dtype[Any]) -> numba_types.Array:
    stored = numba.from_dtype(STORED[dtype])
    return numba_types.Array(stored, 1, "C", readonly=True, aligned=False)


def _target_type(dtype: np.dtype[Any] | None) -> numba_types.Type:
    if dtype is None:
        return numba_types.none
    return numba_types.Array(numba.from_dtype(STORED[dtype]), 1, "C", aligned=False)
