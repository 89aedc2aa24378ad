"""The directory of generated kernels: real files, in a directory that only its owner can write.

Numba caches machine code beside the source file of a function, and throws it away when that file changes. So each
generated module becomes a file named by the hash of its text. Several versions of stepwire use one directory, and no
file is ever rewritten.

The directory is trusted, because Numba's cache holds pickles. A directory that others own or can write, or that
lies in such a one, is refused. A private temporary directory then stands in for the life of the process.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ENVIRONMENT
from stepwire_server.host.trusted_paths import require_trusted_above

__all__ = ["kernel_directory", "require_named_directory", "store"]

_log = logging.getLogger(__name__)

# Numba compares the file's time and size with those in its index. A fixed time keeps the machine code valid
# where the directory was copied without fractions of seconds, as in a layer of a container image.
_FIXED_TIME_SECONDS = 1_000_000_000


def kernel_directory(environ: Mapping[str, str] = ENVIRONMENT) -> pathlib.Path:
    """Return the directory for generated kernels, created with mode 0700 if missing.

    The directory is `$STEPWIRE_CACHE_DIR`, else `$XDG_CACHE_HOME/stepwire`, else `~/.cache/stepwire`. A temporary
    directory, with a warning in the log, stands in for one that cannot be written or is not the caller's alone.
    """
    try:
        wanted = _wanted(environ)
        _make_private(wanted)
    except (OSError, RuntimeError) as problem:  # RuntimeError: the user has no home
        _log.warning("no kernel cache: %s; set STEPWIRE_CACHE_DIR to a directory of your own", problem)
        return _temporary()
    return wanted


def require_named_directory(environ: Mapping[str, str] = ENVIRONMENT) -> None:
    """Refuse a `STEPWIRE_CACHE_DIR` that cannot be used, before a server starts.

    A named directory that cannot be used is a volume mounted wrongly, and the server would compile anew at every start.
    A server does without the directory only where nobody named one.

    Raises:
        InvalidRequestError: it cannot be made or written, or is not the caller's alone.
    """
    if not environ.get("STEPWIRE_CACHE_DIR"):
        return
    try:
        _make_private(_wanted(environ))
    except OSError as problem:
        raise InvalidRequestError(
            f"STEPWIRE_CACHE_DIR: {environ['STEPWIRE_CACHE_DIR']!r} cannot be used by user {os.geteuid()}: {problem}; "
            "name a directory that this user alone can write, or mount a volume there in which this user can make one",
            metadata={"field": "STEPWIRE_CACHE_DIR"},
        ) from None


def store(directory: pathlib.Path, name: str, source: str) -> pathlib.Path:
    """Write `source` as `<name>_<hash>.py` unless it is there already, and return its path.

    Readers in other processes see the whole file or none.
    """
    data = source.encode()
    path = directory / f"{name}_{hashlib.sha256(data).hexdigest()[:16]}.py"
    if not (path.is_file() and path.read_bytes() == data):
        descriptor, unfinished = tempfile.mkstemp(dir=directory, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.utime(unfinished, (_FIXED_TIME_SECONDS, _FIXED_TIME_SECONDS))
        os.replace(unfinished, path)
    return path


def _wanted(environ: Mapping[str, str]) -> pathlib.Path:
    if chosen := environ.get("STEPWIRE_CACHE_DIR"):
        return pathlib.Path(chosen).absolute()
    if base := environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(base).absolute() / "stepwire"
    return pathlib.Path.home() / ".cache" / "stepwire"


def _make_private(directory: pathlib.Path) -> None:
    """Make it if need be; raise OSError unless the caller owns it, and can write it, and nobody else can.

    A folder above it that others can write would let them put a directory of their own in its place.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} belongs to, or can be written by, another user")
    require_trusted_above(directory)
    with tempfile.TemporaryFile(dir=directory):
        pass


@functools.cache
def _temporary() -> pathlib.Path:
    """Make one private directory a process; where nothing can be written, name a place where `store` fails."""
    try:
        directory = tempfile.mkdtemp(prefix="stepwire-kernels-")
    except OSError:
        return pathlib.Path(os.devnull) / "kernels"
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return pathlib.Path(directory)
