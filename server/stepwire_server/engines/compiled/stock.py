"""Kernels compiled ahead, as in a container image, and how a server comes to them.

A stock is a directory with one directory a level of processors (`levels`), each of which looks like a kernel cache.
A server copies what is there for its processor into its own cache and goes on from there. Not shared in place: Numba
keeps its cache beside the source and wants to write it, and a kernel cache belongs to the user who runs it alone,
whose number nobody knew when the image was built. Read is only what nobody but root and that user could have written,
because what Numba keeps are pickles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from stepwire.errors import StepwireError
from stepwire_server.config import ENVIRONMENT
from stepwire_server.engines.compiled.levels import LEVELS, Level, level_of_this_processor

__all__ = ["fill", "make", "prepare_commonest", "stocked_level"]

_log = logging.getLogger(__name__)

_INDEX_SUFFIX = ".nbi"


def stocked_level(environ: Mapping[str, str] = ENVIRONMENT) -> tuple[Level, pathlib.Path] | None:
    """Return the level to compile for and where its kernels lie; None to compile for this very processor.

    `$STEPWIRE_KERNELS` names the stock. Whoever has set NUMBA_CPU_NAME or NUMBA_CPU_FEATURES has the say.
    """
    stock = environ.get("STEPWIRE_KERNELS")
    if not stock or environ.get("NUMBA_CPU_NAME") or environ.get("NUMBA_CPU_FEATURES"):
        return None
    level = level_of_this_processor()
    if level is None or not (directory := pathlib.Path(stock, level.name)).is_dir():
        _log.warning("no kernels for this processor in %s, which STEPWIRE_KERNELS names; they are compiled here", stock)
        return None
    return level, directory


def fill(cache: pathlib.Path, stock: pathlib.Path) -> None:
    """Copy into a kernel cache what it lacks of a stock. What cannot be copied is compiled when it is needed.

    Args:
        cache: of this user alone; see `kernel_cache`.
        stock: of one level.
    """
    try:
        cache.mkdir(mode=0o700, exist_ok=True)
        for source in _in_order(_trusted(stock)):
            _copy(source, cache / source.relative_to(stock))
    except OSError as problem:
        _log.warning("kernels compiled ahead are not used: %s", problem)


def make(stock: pathlib.Path) -> list[str]:
    """Compile what most sessions ask for, for every level of processors; returns the names of the levels.

    Each level in a process of its own, because Numba has one for the whole process.

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
    """Compile, in this process, into the kernel cache."""
    from stepwire_server.engines.compiled.common_kernels import commonest
    from stepwire_server.engines.cpu.engine import CpuEngine

    engine = CpuEngine(threads=1, use_numba=True)
    for asked in commonest(shared=True):
        engine.prepare(*asked)
    engine.close()


def _trusted(stock: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a stock; OSError where others than root and this user could have written one."""
    paths = [stock, *stock.rglob("*")]
    for path in paths:
        status = path.lstat()
        plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        if not plain or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise PermissionError(f"{path} is no plain file, or others than root and this user can write it")
    return [path for path in paths if path.is_file()]


def _in_order(files: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Put Numba's indexes last, so that none names what is not there yet."""
    return sorted(files, key=lambda path: (path.suffix == _INDEX_SUFFIX, path))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a file with its time, by which Numba knows it; never over one that another process has put there."""
    if target.exists():
        return
    target.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(descriptor)
    try:
        shutil.copyfile(source, unfinished)
        shutil.copystat(source, unfinished)
        os.chmod(unfinished, 0o600)
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, target)
    finally:
        os.unlink(unfinished)
