"""A module of CUDA C: kernels, what they call, and how it is compiled.

The text needs no header, so that NVRTC, nvcc and a C++ compiler with a small shim all compile it. `COMPILE_OPTIONS`
forbid a fused multiply-add; division, square root and subnormals are IEEE by default. So the kernels give the CPU
engine's bits: `a*b + c` rounds twice on both. Memory bounds the passes either way.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import NamedTuple

from stepwire_server.engines.cuda.source.memory import MEMORY
from stepwire_server.engines.cuda.source.prelude import PRELUDE
from stepwire_server.engines.cuda.source.printer import print_function

__all__ = ["COMPILE_OPTIONS", "Kernel", "module_source"]

COMPILE_OPTIONS = ("--fmad=false",)


class Kernel(NamedTuple):
    """One kernel of a module.

    Attributes:
        name: the name of the entry point.
        text: the kernel in CUDA C, which needs the functions, the preludes, and those of every module.
        functions: the Python functions that the kernel calls, each after those it calls.
        preludes: further CUDA C that stands once in a module.
    """

    name: str
    text: str
    functions: tuple[types.FunctionType, ...] = ()
    preludes: tuple[str, ...] = ()


def module_source(kernels: Iterable[Kernel]) -> str:
    """Write a module with these kernels; functions that they share stand in it once."""
    functions: dict[str, types.FunctionType] = {}
    preludes, texts = dict.fromkeys((PRELUDE, MEMORY)), []
    for kernel in kernels:
        texts.append(kernel.text)
        preludes |= dict.fromkeys(kernel.preludes)
        for function in kernel.functions:
            assert functions.setdefault(function.__name__, function) is function, (
                f"two functions are called {function.__name__}"
            )
    return "\n".join([*preludes, *map(print_function, functions.values()), *texts])
