"""The address of a server as people write it, and as gRPC reads it."""

from __future__ import annotations

import os
import pathlib
import urllib.parse
from typing import Final

from stepwire.errors import InvalidRequestError

__all__ = ["MAX_UNIX_PATH_BYTES", "boot_id", "checked_unix_path", "grpc_target", "unix_path", "unix_target"]

_UNIX: Final = "unix:"
MAX_UNIX_PATH_BYTES: Final = 107
"""The longest path that the kernel's `sockaddr_un` has space for, without the zero at its end."""
_BOOT_ID: Final = pathlib.Path("/proc/sys/kernel/random/boot_id")


def unix_path(target: str) -> str | None:
    """Return the path in a target such as `unix:/run/stepwire.sock` or `unix:///run/stepwire.sock`; None in others."""
    if not target.startswith(_UNIX):
        return None
    path = target.removeprefix(_UNIX)
    return path.removeprefix("//") if path.startswith("///") else path


def unix_target(path: str) -> str:
    """Return the target of a Unix socket."""
    return _UNIX + path


def checked_unix_path(path: str, field: str) -> str:
    """Return the absolute path of a socket, after a check that a socket can have the path.

    Args:
        path: the path; the socket need not exist.
        field: the option that an error names.

    Returns:
        The absolute path.

    Raises:
        InvalidRequestError: the path is empty, too long, or contains a zero.
    """
    absolute = os.path.abspath(path) if path and "\0" not in path else ""
    length = len(os.fsencode(absolute))
    if not absolute:
        raise InvalidRequestError.of(
            field, f"{path!r} is no path of a socket; give one such as /run/stepwire/stepwire.sock"
        )
    if length > MAX_UNIX_PATH_BYTES:
        raise InvalidRequestError.of(
            field,
            f"the path {absolute!r} has {length} bytes, and a Unix socket's at most {MAX_UNIX_PATH_BYTES}; choose a "
            "shorter one",
        )
    return absolute


def grpc_target(target: str) -> str:
    """Return a target for gRPC, which decodes a `%41` in the path of a socket as an `A`.

    Raises:
        InvalidRequestError: no socket can have the path in the target.
    """
    path = unix_path(target)
    return target if path is None else _UNIX + urllib.parse.quote(os.fsencode(checked_unix_path(path, "target")))


def boot_id(file: pathlib.Path = _BOOT_ID) -> str:
    """Return the id of this run of the kernel, the same in all its containers; empty if there is no id."""
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
