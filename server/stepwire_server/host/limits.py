"""The processors and the memory that this process may use, container limits included."""

from __future__ import annotations

import math
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Final

from stepwire.errors import InvalidRequestError

__all__ = ["memory_bytes", "processor_count", "processor_name", "require_descriptors"]

_LEAST_DESCRIPTORS: Final = 24

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMBERSHIP = pathlib.Path("/proc/self/cgroup")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def processor_count(cgroup: pathlib.Path = _CGROUP, membership: pathlib.Path = _MEMBERSHIP) -> int:
    """Count the processors this process may run on, at most its container's CPU quota rounded up.

    Args:
        cgroup: the file system of control groups, of version 2 or 1.
        membership: the file that names the groups of this process.
    """
    count = len(os.sched_getaffinity(0))
    for folder in _groups(cgroup, membership, "cpu"):
        quota, _, period = _first_line(folder / "cpu.max").partition(" ")
        quota = quota or _first_line(folder / "cpu.cfs_quota_us")
        period = period or _first_line(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def memory_bytes(cgroup: pathlib.Path = _CGROUP, membership: pathlib.Path = _MEMBERSHIP) -> int:
    """Return the machine's memory, at most its container's limit; the arguments are those of `processor_count`."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _groups(cgroup, membership, "memory"):
        limit = _first_line(folder / "memory.max") or _first_line(folder / "memory.limit_in_bytes")
        total = min(total, int(limit)) if limit.isdigit() else total
    return total


def _groups(cgroup: pathlib.Path, membership: pathlib.Path, controller: str) -> Iterator[pathlib.Path]:
    """Yield the folders of the groups that limit this process, from the root down: each of them does.

    A container may see its own group as the root, or the path from the host's.
    """
    yield cgroup
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = cgroup / controller if controllers else cgroup  # version 1 has a tree for each controller
        for part in ("", *path.split("/")):
            folder /= part
            yield folder


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
