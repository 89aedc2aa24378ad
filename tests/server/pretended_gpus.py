"""Engines over pretended GPUs, for tests of what stands on engines: their kernels run on the processor."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines import CudaEngine
from stepwire_server.engines.cuda.engine import CudaOptions
from stepwire_server.engines.cuda.source import (
    Kernel,
    block_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import Recipe
from tests.server.configs import recipes_of
from tests.support import cuda_shim as shim
from tests.support.fake_cupy import FakeCupy

needs_compiler = pytest.mark.skipif(
    shim.COMPILER is None, reason="g++ is not installed; it compiles the CUDA kernels for the processor"
)


class PretendedGpu(CudaEngine):
    """The GPU engine on a stand-in for CuPy, with buffers so small that a reply needs several of them."""

    def __init__(self, cupy: Any, index: int = 0, **options: int) -> None:
        chosen = CudaOptions(**{"buffers": 3, "buffer_bytes": 2048, "cells": 32} | options)
        super().__init__(index, cupy, chosen, cupy.libcuda)


class PlacedGpu(PretendedGpu):
    """One for servers: they compile ahead in a thread that outlives them."""

    def warm_up(self) -> None: ...


def kernels_of(recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Iterator[Kernel]:
    """Yield the kernels of a recipe's steps, besides those of all recipes."""
    yield update_kernel(recipe, gradient.name, None if reply is None else reply.name)
    if recipe.rule.direction is not None:
        yield measure_kernel(recipe, gradient.name)


def kernels_of_config(config: SessionConfig) -> Iterator[Kernel]:
    """Yield the kernels of a session's steps, in its own dtypes."""
    for recipe, precision in itertools.product(recipes_of(config), frozenset().union(*config.held_precisions)):
        yield from kernels_of(recipe.held(precision), config.gradient_dtype, config.reply_dtype)


def library_of(kernels: Iterable[Kernel], directory: pathlib.Path) -> Any:
    """Compile these kernels and the shared ones as two libraries, one for each processor.

    Starting g++ lasts longer than compiling a kernel.
    """
    found = {kernel.name: kernel for kernel in [*gradient_kernels(), *block_kernels(), *kernels]}
    named = [found[name] for name in sorted(found)]
    return shim.Library([module_source(named[k::2]) for k in range(2)], directory)


def pretended_cupy(directory: pathlib.Path, **options: Any) -> Any:
    """Make a stand-in for CuPy; see `fake_cupy.FakeCupy`."""
    return FakeCupy(directory, **options)


def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Keep pretended machine code in a fresh directory for a block, so that nothing is found compiled."""
    directory = tmp_path_factory.mktemp("cubins")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_CACHE_DIR", str(directory))
        yield directory


def compiled_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return where compiled kernels are kept between runs, beside pytest's own cache."""
    cache = getattr(request.config, "cache", None)
    return pathlib.Path(cache.mkdir("stepwire-kernels")) if cache else tmp_path_factory.mktemp("kernels")
