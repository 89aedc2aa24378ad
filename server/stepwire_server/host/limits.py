"""The processors and the memory that this process may use, container limits included."""

from __future__ import annotations

import math
import os
import pathlib
import resource
from typing import Final

from stepwire.errors import InvalidRequestError

__all__ = ["memory_bytes", "processor_count", "processor_name", "require_descriptors"]

_LEAST_DESCRIPTORS: Final = 24

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def processor_count(cgroup: pathlib.Path = _CGROUP) -> int:
    """Count the processors this process may run on, at most its container's CPU quota rounded up."""
    count = len(os.sched_getaffinity(0))
    quota, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def memory_bytes(cgroup: pathlib.Path = _CGROUP) -> int:
    """Return the machine's memory, at most its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def processor_name(cpuinfo: pathlib.Path = _CPUINFO) -> str:
    """Return the processor's model name, or "CPU" where the system does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return "CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")


def require_descriptors(limit: int | None = None) -> None:
    """Refuse a limit of open files that the server's own files reach, before it starts.

    Args:
        limit: the limit; None for that of this process.

    Raises:
        InvalidRequestError: the limit is too low.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if 0 <= soft < _LEAST_DESCRIPTORS:
        raise InvalidRequestError.of(
            "descriptors",
            f"this process may open {soft} files, and a server needs {_LEAST_DESCRIPTORS} and more for its clients; "
            "raise `ulimit -n`",
        )


def _first_line(path: pathlib.Path) -> str:
    try:
        return path.read_text().partition("\n")[0]
    except OSError:
        return ""
