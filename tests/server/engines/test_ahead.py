"""Kernels compiled ahead are found by a process of another cache, and every level gives the same bits."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import types

import pytest

from stepwire.errors import StepwireError
from stepwire_server.engines import ahead
from stepwire_server.engines.compiled.levels import LEVELS, level_of_this_processor

pytest.importorskip("numba")

# Numba takes seconds to import and is aimed once a process, so scripts fork after the import: they do their work, and
# print, in a child for each line of arguments that they are given.
FORKING = """
import os, sys
import numba, llvmlite.binding

def each(work):
    for line in sys.argv[1:]:
        if not os.fork():
            work(*line.split("|"))
            sys.stdout.flush()
            os._exit(0)
        assert os.wait()[1] == 0
"""

# Prints how many of the commonest kernels were found and how many compiled.
PREPARE = (
    FORKING
    + """
from stepwire_server.engines.cpu import engine as cpu
from stepwire_server.engines import ahead
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels
def prepare(cache, stock):
    os.environ.update(STEPWIRE_CACHE_DIR=cache, STEPWIRE_KERNELS=stock)
    kernels = NumbaKernels()
    cpu._numba_kernels = lambda: kernels
    ahead.prepare_commonest()
    found = [kernel.stats for kernel in kernels._built.values()]
    hits, misses = (sum(sum(getattr(one, name).values()) for one in found) for name in ("cache_hits", "cache_misses"))
    print(hits, misses)

each(prepare)
"""
)

# Steps random numbers with a kernel of a level, or of this very processor, and prints a digest of what became of them.
STEP = (
    FORKING
    + """
import hashlib, pathlib
import numpy as np
from stepwire_server.engines.compiled.common_kernels import commonest
from stepwire_server.engines.compiled.levels import LEVELS, aim
from stepwire_server.engines.cpu.numba_kernels import NumbaKernels

def step(directory, name):
    level = next((level for level in LEVELS if level.name == name), None)
    if level is not None:
        aim(level)
    kernels, random = NumbaKernels(pathlib.Path(directory)), np.random.default_rng(5)
    found = []
    for recipe, gradient, reply in commonest():
        arrays = [random.random(1003, np.float32) for _ in range(3)]
        sent, out = random.random(1003, np.float32).astype(gradient), np.zeros(1003, reply)
        kernel, sums = kernels.update(recipe, gradient, reply), np.zeros(2)
        kernel(*arrays, kernels.source(sent), kernels.target(out), 0, 0, 0, 1003, sums, *[0.37] * len(recipe.scalars))
        found.append(hashlib.sha256(b"".join(array.tobytes() for array in [*arrays, out])).hexdigest() + f" {gradient}")
    print(*found, sep=", ")

each(step)
"""
)


def run(script: str, *arguments: tuple[object, object]) -> tuple[list[str], str]:
    """Run a script; returns a line for each tuple of arguments, and what it warned of."""
    lines = ["|".join(map(str, each)) for each in arguments]
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="a stock of kernels takes long to compile; CI runs it")
def test_what_was_compiled_ahead_is_for_everybody_and_computes_the_same_bits(tmp_path: pathlib.Path) -> None:
    """One test, since a stock takes many seconds to make. Without a stock, kernels are compiled; a second time not."""
    own = level_of_this_processor()
    if own is None:
        pytest.skip("this processor has no level")
    stock, cache, here = tmp_path / "image" / "kernels", tmp_path / "cache", tmp_path / "here"
    stock.parent.mkdir()
    assert ahead.make(stock) == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    modes = {path.stat().st_mode & 0o777 for path in stock.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in [stock, *stock.rglob("*")] if path.is_dir()}
    assert (modes, folders) == ({0o644}, {0o755})

    found, warned = run(PREPARE, (cache, stock), (cache, stock), (here, tmp_path / "nothing"))
    assert found == ["8 0", "8 0", "0 8"]
    assert warned.count("no kernels for this processor") == 1
    (directory,) = cache.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700

    levels = [(stock / level.name, level.name) for level in LEVELS if level.needs <= own.needs]
    digests, _ = run(STEP, *levels, (here, ""))
    assert digests[-1].count("float") == 4
    assert len(digests) == len(levels) + 1 and set(digests) == {digests[-1]}


def test_a_level_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    if level_of_this_processor() is None:
        pytest.skip("this processor has no level")
    failed = types.SimpleNamespace(returncode=1)
    monkeypatch.setattr(ahead.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StepwireError, match="kernels for x86-64-v4 could not be compiled"):
        ahead.make(tmp_path)
