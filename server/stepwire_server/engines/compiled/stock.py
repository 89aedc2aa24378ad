"""The way of a server to kernels compiled ahead, as in a container image.

A stock is a directory with one directory a level of processors (`levels`), each of which looks like a kernel cache.
A server copies the files for its processor into its own cache. The stock is not used in place, because Numba writes its
cache beside the source. A kernel cache belongs to one user alone, whose number nobody knew when the image was built.
Numba's files are pickles, so a stock is read only where root and that user alone can write it. `ahead` makes a stock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping

from stepwire_server.config import ENVIRONMENT
from stepwire_server.engines.compiled.levels import Level, level_of_this_processor
from stepwire_server.host.trusted_paths import require_trusted_above

__all__ = ["fill", "stocked_level"]

_log = logging.getLogger(__name__)

_INDEX_SUFFIX = ".nbi"


def stocked_level(environ: Mapping[str, str] = ENVIRONMENT) -> tuple[Level, pathlib.Path] | None:
    """Return the level to compile for and where its kernels lie; None to compile for this very processor.

    `$STEPWIRE_KERNELS` names the stock. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES come before it.
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
    """Copy the files of a stock that a kernel cache lacks. A kernel that cannot be copied is compiled when needed.

    Args:
        cache: the cache, of this user alone; see `cache`.
        stock: the stock of one level.
    """
    try:
        cache.mkdir(mode=0o700, exist_ok=True)
        for source in _in_order(_trusted(stock)):
            _copy(source, cache / source.relative_to(stock))
    except OSError as problem:
        _log.warning("kernels compiled ahead are not used: %s", problem)


def _trusted(stock: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a stock; OSError where others than root and this user could have written one."""
    require_trusted_above(stock)
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
