"""The port file of a server: its content is the port, and its presence says that the server listens."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Final

from stepwire.errors import InvalidRequestError

__all__ = ["await_ports", "write_ports"]

_LOOK_SECONDS: Final = 0.02


def write_ports(path: pathlib.Path, ports: Iterable[int]) -> None:
    """Write one line for each port, in one step, so that no reader sees half of the file.

    Args:
        path: the file; an old one is replaced.
        ports: the ports.

    Raises:
        InvalidRequestError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text("".join(f"{port}\n" for port in ports))
        temporary.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InvalidRequestError.of(
            "port_file", f"{str(path)!r} cannot be written: {problem.strerror}; name a file in a folder of this user"
        ) from None


def await_ports(
    process: subprocess.Popen[bytes], path: pathlib.Path, patient: Callable[[], bool] = lambda: True
) -> list[int]:
    """Wait until a process writes its ports.

    Args:
        process: the process.
        path: the port file.
        patient: False ends the wait.

    Returns:
        The ports; none if the process or the patience ends first.
    """
    while patient():
        ended = process.poll() is not None  # asked first, so that the file of a process that ended is still seen
        if path.exists():
            return [int(line) for line in path.read_text().split()]
        if ended:
            break
        time.sleep(_LOOK_SECONDS)
    return []
