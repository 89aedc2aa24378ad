"""The checks of `stepwire doctor` before a server starts: the machine, its GPUs, and the address for clients."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import pathlib
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from stepwire_server.config import ENVIRONMENT, MIB
from stepwire_server.doctor.disk import examine_data_directory
from stepwire_server.doctor.port import examine_port
from stepwire_server.doctor.store import examine_checkpoint_store
from stepwire_server.engines.compiled import cache as kernel_cache
from stepwire_server.engines.probe import Finding, asked_gpus, examine_cuda, visible_gpus
from stepwire_server.host import limits as host

__all__ = [
    "examine",
    "examine_devices",
    "examine_kernel_cache",
    "examine_open_files",
    "examine_port",
    "examine_processor",
    "examine_shared_memory",
    "healthy",
    "report",
]

# The shared memory that Docker gives a container by default.
_DOCKERS_SHARED_BYTES: Final = 64 * MIB
_ENOUGH_FILES: Final = 1024  # one socket for each client, and the files of gRPC, Numba and CUDA
# The checks with one finding for the whole machine, however many GPUs there are.
_OF_ALL_GPUS: Final = ("cupy", "driver", "device")

_SHARED_MEMORY: Final = pathlib.Path("/dev/shm")
_SHARED_REMEDY: Final = "docker run --shm-size=1g, or: docker run --ipc=host"
_CACHE_REMEDY: Final = (
    "mkdir -m 700 ~/stepwire-cache && export STEPWIRE_CACHE_DIR=~/stepwire-cache; in a container, mount a volume that "
    "its user can write"
)


def examine(
    config_device: str, bind: str, data_dir: str = "", checkpoint_store: str = "", cupy: Any = None
) -> list[Finding]:
    """Check everything that a server with these settings needs. The checks leave nothing behind and raise nothing.

    Args:
        config_device: the setting `device`, such as "auto" or "cuda:0,cuda:1".
        bind: the setting `bind`, host:port or unix:/path.
        data_dir: the setting `data_dir`; empty for none.
        checkpoint_store: the setting `checkpoint_store`; empty for none.
        cupy: the CuPy module, or a stand-in; None imports it if a GPU is asked for.
    """
    return [
        examine_processor(),
        examine_kernel_cache(),
        *examine_devices(config_device, cupy),
        examine_port(bind),
        examine_shared_memory(),
        examine_open_files(),
        *examine_data_directory(data_dir),
        *examine_checkpoint_store(checkpoint_store),
    ]


def healthy(findings: Iterable[Finding]) -> bool:
    """Tell whether every check passed that a server needs."""
    return all(finding.ok or finding.optional for finding in findings)


def report(findings: Iterable[Finding]) -> str:
    """Return one aligned line for each finding, and below a problem a line with its remedy."""
    lines = []
    for finding in findings:
        mark = "ok" if finding.ok else "note" if finding.optional else "WRONG"
        lines.append(f"{mark:<7} {finding.check:<14} {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<22} -> {finding.remedy}")
    return "\n".join(lines)


# --- the machine ----------------------------------------------------------------------------------------------


def examine_processor() -> Finding:
    """Name the processor and the compiler of its kernels."""
    name = f"{host.processor_name()}, {host.processor_count()} threads"
    try:
        numba = importlib.import_module("numba")
    except Exception as problem:  # an import runs whatever an installation holds
        return _without_numba(name, problem)
    if numba.config.DISABLE_JIT:
        detail = f"{name}, kernels by NumPy, many times slower: NUMBA_DISABLE_JIT is set"
        return Finding("processor", False, detail, "unset NUMBA_DISABLE_JIT", optional=True)
    return Finding("processor", True, f"{name}, kernels by Numba {numba.__version__}")


def _without_numba(name: str, problem: Exception) -> Finding:
    """Return the finding without Numba: the server falls back to NumPy, but does not start with a broken Numba."""
    if importlib.util.find_spec("numba") is None:
        detail = f"{name}, kernels by NumPy, many times slower: Numba is not installed"
        return Finding("processor", False, detail, "pip install numba", optional=True)
    detail = f"{name}; Numba cannot be imported: {_text(problem)}"
    return Finding("processor", False, detail, "pip install --upgrade --force-reinstall numba llvmlite")


def examine_kernel_cache(environment: Mapping[str, str] = ENVIRONMENT) -> Finding:
    """Name the directory of compiled kernels, and the reason if it is not the one that was asked for."""
    directory, problems = _overhear(lambda: kernel_cache.kernel_directory(environment))
    if not problems:
        return Finding("kernel cache", True, str(directory))
    if environment.get("STEPWIRE_CACHE_DIR"):  # `serve` does not start
        return Finding("kernel cache", False, _text(problems[0]), _CACHE_REMEDY)
    detail = f"{_text(problems[0])}; kernels are kept in {directory} until the process ends"
    if directory.is_dir():
        return Finding("kernel cache", False, detail, _CACHE_REMEDY, optional=True)
    detail = f"{_text(problems[0])}; no temporary directory can be written either"
    return Finding("kernel cache", False, detail, "export TMPDIR=/dev/shm; in a container use: docker run --tmpfs /tmp")


def _overhear(act: Callable[[], pathlib.Path]) -> tuple[pathlib.Path, list[Any]]:
    """Return the directory, and the problems that its choice would have logged."""
    problems: list[Any] = []

    def keep(record: logging.LogRecord) -> bool:
        problems.append(record.args[0] if isinstance(record.args, tuple) else record.getMessage())
        return False

    log = logging.getLogger(kernel_cache.__name__)
    level = log.level
    log.setLevel(logging.WARNING)
    log.addFilter(keep)
    try:
        return act(), problems
    finally:
        log.removeFilter(keep)
        log.setLevel(level)


def examine_shared_memory(
    directory: pathlib.Path = _SHARED_MEMORY, statvfs: Callable[[pathlib.Path], Any] = os.statvfs
) -> Finding:
    """Measure the shared memory, of which containers get little, and make an anonymous file in it."""
    try:
        status = statvfs(directory)
        os.close(os.memfd_create("stepwire-doctor"))
    except (OSError, AttributeError) as problem:  # AttributeError: a system without memfd_create
        return Finding("shared memory", False, f"{directory}: {_text(problem)}", _SHARED_REMEDY, optional=True)
    size_bytes, free_bytes = status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail
    detail = f"{directory}: {_mib(free_bytes)} of {_mib(size_bytes)} are free"
    enough = free_bytes > _DOCKERS_SHARED_BYTES
    return Finding("shared memory", enough, detail, "" if enough else _SHARED_REMEDY, optional=True)


def examine_open_files(limits: Callable[[int], tuple[int, int]] = resource.getrlimit) -> Finding:
    """Read the number of files, and so of connections, that this process may have open."""
    most, _ = limits(resource.RLIMIT_NOFILE)
    enough = most == resource.RLIM_INFINITY or most >= _ENOUGH_FILES
    shown = "no limit" if most == resource.RLIM_INFINITY else f"at most {most}"
    remedy = "" if enough else "ulimit -n 4096; in a container use: docker run --ulimit nofile=4096"
    return Finding("open files", enough, shown, remedy, optional=True)


# --- GPUs -----------------------------------------------------------------------------------------------------


def examine_devices(device: str, cupy: Any = None) -> list[Finding]:
    """Check the GPUs that a server with this setting would use.

    GPUs asked for by number must all work. With `cuda` one GPU must work. With `auto` none must, because the CPU serves
    instead.

    Args:
        device: the setting `device`.
        cupy: the CuPy module, or a stand-in; None imports it.
    """
    if device == "cpu":
        return [Finding("device", True, "no GPU is asked for (--device cpu)")]
    named = asked_gpus(device)
    by_gpu = {number: examine_cuda(number, cupy) for number in named or visible_gpus(cupy)}
    spared = device == "auto" or (not named and any(map(healthy, by_gpu.values())))
    findings = [_with_gpu(finding, number, len(by_gpu)) for number, found in by_gpu.items() for finding in found]
    if spared:
        findings = [finding if finding.ok else finding._replace(optional=True) for finding in findings]
    return list(dict.fromkeys(findings))


def _with_gpu(finding: Finding, number: int, count: int) -> Finding:
    """Name the GPU in its finding if there are several."""
    if count == 1 or finding.check in _OF_ALL_GPUS:
        return finding
    return finding._replace(detail=f"cuda:{number}: {finding.detail}")


# --- words ----------------------------------------------------------------------------------------------------


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / MIB:,.0f} MiB"


def _text(problem: object) -> str:
    """Return a problem in one line."""
    return " ".join(str(problem).split())
