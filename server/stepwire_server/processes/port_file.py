"""The file by which a server tells its port, and by being there that it listens."""

from __future__ import annotations

import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Final

__all__ = ["await_ports", "write_ports"]

_LOOK_SECONDS: Final = 0.02


def write_ports(path: pathlib.Path, ports: Iterable[int]) -> None:
    """Write a line a port, whole or not at all, so that a reader that sees the file sees all of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(f"{port}\n" for port in ports))
    temporary.replace(path)


def await_ports(
    process: subprocess.Popen[bytes], path: pathlib.Path, patient: Callable[[], bool] = lambda: True
) -> list[int]:
    """Wait until a process writes its ports; none if it ends before, or patience does."""
    while patient():
        ended = process.poll() is not None  # looked at first: the file of a process that ended is still seen
        if path.exists():
            return [int(line) for line in path.read_text().split()]
        if ended:
            break
        time.sleep(_LOOK_SECONDS)
    return []
