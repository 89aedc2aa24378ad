"""The machine a benchmark ran on, in words."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple


def describe() -> dict[str, str]:
    """Return processor, cores, memory, kernel and the versions that matter."""
    packages = {name: _version(name) for name in ("grpcio", "protobuf", "numpy", "numba")}
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return _status(pid, "VmRSS")


def peak_resident_bytes(pid: int) -> int:
    """Return the largest resident memory since the start or the last `reset_peak`."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Start a new measurement of the peak."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


class Work(NamedTuple):
    """The work of the threads of a process so far.

    Attributes:
        cpu_seconds: the time on a processor.
        switches: the waits: how often a thread gave up its processor by itself.
    """

    cpu_seconds: float
    switches: int


def work(pid: int) -> Work:
    """Return the work of the threads of a process that are there now."""
    seconds, switches = 0.0, 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            nanoseconds = int((task / "schedstat").read_text().split()[0])
            lines = (task / "status").read_text().splitlines()
            switches += next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
            seconds += nanoseconds * 1e-9
    return Work(seconds, switches)


def added(total: Work | None, before: Work, after: Work) -> Work:
    """Return the work until now, and between two moments."""
    seconds, switches = total or (0.0, 0)
    return Work(seconds + after.cpu_seconds - before.cpu_seconds, switches + after.switches - before.switches)


def _status(pid: int, field: str) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
