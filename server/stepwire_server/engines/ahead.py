"""Kernels compiled ahead, as for a container image: a stock for every level of processors.

A stock is a directory with one directory a level, each of which looks like a kernel cache. `compiled.stock` copies from
a stock; building one needs the engine itself, so this module lies above both.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from stepwire.errors import StepwireError
from stepwire_server.config import ENVIRONMENT
from stepwire_server.engines.compiled.common_kernels import commonest
from stepwire_server.engines.compiled.levels import LEVELS, Level, level_of_this_processor
from stepwire_server.engines.cpu.engine import CpuEngine

__all__ = ["make", "prepare_commonest"]


def make(stock: pathlib.Path) -> list[str]:
    """Compile the kernels of most sessions for every level of processors.

    Each level has a process of its own, because Numba compiles for one level a process.

    Args:
        stock: the directory of the stock; it is made where it is missing.

    Returns:
        The names of the levels; none on processors that have no level.

    Raises:
        StepwireError: a level could not be compiled.
        OSError: the directory cannot be written.
    """
    levels = LEVELS if level_of_this_processor() else ()
    for level in levels:
        (stock / level.name).mkdir(mode=0o700, parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        list(processes.map(lambda level: _compile(stock, level), levels))
    for path in [stock, *stock.rglob("*")] if levels else []:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return [level.name for level in levels]


def _compile(stock: pathlib.Path, level: Level) -> None:
    own = {
        "STEPWIRE_CACHE_DIR": str(stock.absolute() / level.name),
        "NUMBA_CPU_NAME": level.name,
        "NUMBA_CPU_FEATURES": level.features,
    }
    code = f"from {__name__} import prepare_commonest; prepare_commonest()"
    done = subprocess.run([sys.executable, "-c", code], env={**ENVIRONMENT, **own}, check=False)
    if done.returncode:
        raise StepwireError(f"kernels for {level.name} could not be compiled; the message is above")


def prepare_commonest() -> None:
    """Compile the kernels of most sessions in this process, into its kernel cache."""
    engine = CpuEngine(threads=1, use_numba=True)
    for asked in commonest(shared=True):
        engine.prepare(*asked)
    engine.close()
