"""The check of a GPU from the ground up: findings, and the commands that put things right.

Nothing here raises, because a broken installation of CUDA fails in more ways than anybody has listed. An error that is
not expected becomes a finding in its own words. Unverified on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from stepwire_server.config import ENVIRONMENT

__all__ = ["Finding", "Surroundings", "asked_gpus", "examine_cuda", "look_around", "visible_gpus"]

# Status numbers of CUDA's runtime that cannot start; every other number is shown as it comes.
_INSUFFICIENT_DRIVER: Final = 35
_NO_DEVICE: Final = 100

# Of the driver: no code for this device, code that it does not know, or intermediate code newer than it.
_FOREIGN_CODE: Final = (209, 218, 222)

_ENOUGH_BYTES: Final = 1 << 30
_ENOUGH_SHARE: Final = 0.1
_PINNED_BYTES: Final = 1 << 20
_LONGEST_TEXT: Final = 300

# The oldest drivers for each CUDA, and the oldest devices that its compiler knows.
_DRIVERS: Final = {12: "525", 13: "580"}
_CAPABILITIES: Final = {12: (5, 0), 13: (7, 5)}


def _install(major: int) -> str:
    """Return the command that installs the packages of an extra, wherever stepwire itself came from."""
    return f"pip install cupy-cuda{major}x 'cuda-toolkit[nvrtc,cudart]=={major}.*'"


# Two CuPys in one environment overwrite each other, so the one goes first.
_CUDA12_REMEDY: Final = f"pip uninstall -y cupy-cuda13x && {_install(12)}"
_NO_DRIVER_REMEDY: Final = (
    "install the NVIDIA driver and check it with: nvidia-smi; in a container, install nvidia-container-toolkit on the "
    "host and use: docker run --gpus all"
)
_HALF_DRIVER_REMEDY: Final = (
    "reinstall the driver; in a container use: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)
_GPUS_REMEDY: Final = "check the host with: nvidia-smi; in a container use: docker run --gpus all"
_VISIBLE_REMEDY: Final = "unset CUDA_VISIBLE_DEVICES"
_PINNED_REMEDY: Final = "ulimit -l unlimited; in a container use: docker run --ulimit memlock=-1"
_IPC_REMEDY: Final = (
    "in a container use: docker run --ipc=host --pid=host; under WSL there is no CUDA IPC, and clients use gRPC"
)
_FREE_REMEDY: Final = "see which processes hold it with: nvidia-smi; or keep sessions small with: --memory-budget 512M"
_UNKNOWN_REMEDY: Final = "check the driver and the device with: nvidia-smi"
_START_REMEDIES: Final[dict[Any, str]] = {
    802: "sudo systemctl start nvidia-fabricmanager",  # the switches between GPUs are not set up
    803: "sudo reboot: the driver was updated, and its old kernel module still runs",
    804: "unset LD_LIBRARY_PATH: a CUDA compatibility package hides the libcuda.so.1 of the driver",
}


class Finding(NamedTuple):
    """The finding of one check.

    Attributes:
        check: the short name of the check, such as "driver".
        ok: True where all is well.
        detail: the finding, in one line.
        remedy: the command or flag that puts it right; empty where all is well.
        optional: True where a server does not need it.
    """

    check: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False


class Surroundings(NamedTuple):
    """The signs of a machine's GPUs that need no CUDA.

    Attributes:
        driver_library: True where `libcuda.so.1`, which comes with the driver, loads.
        device_nodes: True where there are device files of the driver.
        visible: `CUDA_VISIBLE_DEVICES`; None where it is not set.
    """

    driver_library: bool
    device_nodes: bool
    visible: str | None = None


class _Subject(NamedTuple):
    cupy: Any
    device: int
    around: Surroundings


def look_around(
    environ: Mapping[str, str] = ENVIRONMENT,
    devices: pathlib.Path = pathlib.Path("/dev"),
    load: Callable[[str], Any] = ctypes.CDLL,
) -> Surroundings:
    """Look for the driver without CuPy. WSL has one device file for all GPUs, `dxg`."""
    try:
        load("libcuda.so.1")
        found = True
    except OSError:
        found = False
    nodes = (devices / "dxg").exists() or any(devices.glob("nvidia[0-9]*"))
    return Surroundings(found, nodes, environ.get("CUDA_VISIBLE_DEVICES"))


def asked_gpus(device: str) -> tuple[int, ...]:
    """Return the numbers of the GPUs that the setting `device` names, as in "cuda:0,cuda:2"; none where it has none."""
    return tuple(map(int, re.findall(r"cuda:([0-9]+)", device)))


def visible_gpus(cupy: Any = None) -> range:
    """Number the GPUs that CUDA shows; without any, the first stands in, and its findings name the fault."""
    try:
        cupy = cupy or importlib.import_module("cupy")
        return range(cupy.cuda.runtime.getDeviceCount() or 1)
    except Exception:  # see `_guarded`
        return range(1)


def examine_cuda(index: int, cupy: Any = None, around: Surroundings | None = None) -> list[Finding]:
    """Check one GPU from the ground up; a failure that makes the later checks meaningless is the last finding.

    Args:
        index: the device, as CUDA numbers the visible ones.
        cupy: the CuPy module, or a stand-in; None imports it.
        around: the signs of the machine; None to look for them.

    Returns:
        The findings, in the order of the checks.
    """
    try:
        cupy = cupy or importlib.import_module("cupy")
    except Exception as problem:  # an import runs whatever an installation holds
        return [Finding("cupy", False, f"CuPy cannot be imported: {_text(problem)}", _extras())]
    asked = _Subject(cupy, index, around or look_around())
    findings = [_guarded("cupy", _examine_cupy, asked)]
    for check, examine in _GROUND.items():
        if not findings[-1].ok:
            return findings
        findings.append(_guarded(check, examine, asked))
    if findings[-1].ok:
        findings += [_guarded(check, examine, asked) for check, examine in _ABILITIES.items()]
    return findings


def _guarded(check: str, examine: Callable[[_Subject], Finding], asked: _Subject) -> Finding:
    try:
        return examine(asked)
    except Exception as problem:  # CuPy has no common base for what a broken installation raises
        remedy = _extras() if check == "cupy" else _UNKNOWN_REMEDY
        return Finding(check, False, _text(problem), remedy, optional=check in _OPTIONAL)


def _examine_cupy(asked: _Subject) -> Finding:
    built = _version(asked.cupy.cuda.runtime.runtimeGetVersion())
    return Finding("cupy", True, f"CuPy {asked.cupy.__version__} for CUDA {built}")


# --- the ground: without it nothing else makes sense ----------------------------------------------------------


def _examine_driver(asked: _Subject) -> Finding:
    runtime = asked.cupy.cuda.runtime
    driver = runtime.driverGetVersion()
    if driver == 0:
        return _no_driver(asked.around)
    try:
        runtime.getDeviceCount()
    except Exception as problem:
        return _no_start(asked, driver, problem)
    return Finding("driver", True, f"NVIDIA driver for CUDA {_version(driver)}")


def _no_driver(around: Surroundings) -> Finding:
    """Tell a machine without a driver from one where only half of it arrived."""
    if around.driver_library:
        detail = "libcuda.so.1 loads, but no driver answers behind it; it may be the stub of a CUDA toolkit"
        return Finding("driver", False, detail, "unset LD_LIBRARY_PATH, and check the driver with: nvidia-smi")
    if around.device_nodes:
        detail = "there are device files, but libcuda.so.1 does not load: the driver's libraries are missing"
        return Finding("driver", False, detail, _HALF_DRIVER_REMEDY)
    detail = "no NVIDIA driver: libcuda.so.1 does not load and there is no /dev/nvidia0"
    return Finding("driver", False, detail, _NO_DRIVER_REMEDY)


def _no_start(asked: _Subject, driver: int, problem: Exception) -> Finding:
    status = getattr(problem, "status", None)
    if status == _INSUFFICIENT_DRIVER:
        return _old_driver(driver, asked.cupy.cuda.runtime.runtimeGetVersion())
    known = f"NVIDIA driver for CUDA {_version(driver)}, but "
    if status == _NO_DEVICE:
        return Finding("driver", False, f"{known}no device{_shown(asked.around)}", _device_remedy(asked.around))
    return Finding("driver", False, known + _text(problem), _START_REMEDIES.get(status, _UNKNOWN_REMEDY))


def _old_driver(driver: int, needed: int) -> Finding:
    detail = f"the NVIDIA driver is for CUDA {_version(driver)}, CuPy for CUDA {_version(needed)}"
    known = _DRIVERS.get(needed // 1000)
    remedy = f"install NVIDIA driver {known} or newer" if known else "install a newer NVIDIA driver"
    if needed // 1000 == 13 and driver // 1000 == 12:
        remedy += f", or: {_CUDA12_REMEDY}"
    return Finding("driver", False, detail, remedy)


def _examine_device(asked: _Subject) -> Finding:
    runtime = asked.cupy.cuda.runtime
    count = runtime.getDeviceCount()
    if asked.device >= count:
        return _no_such_device(asked, count)
    properties = runtime.getDeviceProperties(asked.device)
    capability = (properties["major"], properties["minor"])
    detail = f"cuda:{asked.device} is {properties['name'].decode()}, compute capability {_dotted(capability)}"
    compiler = runtime.runtimeGetVersion() // 1000
    oldest = _CAPABILITIES.get(compiler, (0, 0))
    if capability < oldest:
        detail += f"; CUDA {compiler} compiles for {_dotted(oldest)} and newer"
        return Finding("device", False, detail, _CUDA12_REMEDY if compiler == 13 else "use --device cpu")
    return Finding("device", True, detail + _shown(asked.around))


def _no_such_device(asked: _Subject, count: int) -> Finding:
    seen = {0: "no device", 1: "one device, cuda:0"}.get(count, f"{count} devices, cuda:0 to cuda:{count - 1}")
    detail = f"there is no cuda:{asked.device}: CUDA sees {seen}{_shown(asked.around)}"
    remedy = _device_remedy(asked.around)
    return Finding("device", False, detail, f"use --device cuda:0, or: {remedy}" if count else remedy)


def _device_remedy(around: Surroundings) -> str:
    return _GPUS_REMEDY if around.visible is None else f"{_VISIBLE_REMEDY}; {_GPUS_REMEDY}"


def _shown(around: Surroundings) -> str:
    return "" if around.visible is None else f" (CUDA_VISIBLE_DEVICES={around.visible!r})"


# --- what a device that is there must be able to do -----------------------------------------------------------

# The compiler must neither contract nor flush, or two engines would round differently. 0 = a·b + c holds for these
# three only when the product is rounded first, and half of this subnormal number is another one.
_SOURCE: Final = """extern "C" __global__ void stepwire_probe(float *x) {
    x[3] = x[0] * x[1] + x[2];
    x[5] = x[4] * 0.5f;
}
"""
_OPTIONS: Final = ("--fmad=false",)
_FACTOR: Final = 1.0 + 2.0**-12
_GIVEN: Final = (_FACTOR, _FACTOR, -(1.0 + 2.0**-11), 7.0, 2.0**-140, 7.0)
_RIGHT: Final = (_FACTOR, _FACTOR, -(1.0 + 2.0**-11), 0.0, 2.0**-140, 2.0**-141)


def _on_device(asked: _Subject) -> Any:
    """Return CuPy with the device current in this thread; restoring the one before would make a context on it."""
    runtime = asked.cupy.cuda.runtime
    if runtime.getDevice() != asked.device:
        runtime.setDevice(asked.device)
    return asked.cupy


def _examine_nvrtc(asked: _Subject) -> Finding:
    cupy = _on_device(asked)
    try:
        code, _ = cupy.cuda.compiler.compile_using_nvrtc(_SOURCE, options=_OPTIONS, cache_in_memory=True)
    except Exception as problem:  # a library that is missing or does not fit, or the compiler's own words
        return Finding("nvrtc", False, f"NVRTC does not compile: {_text(problem)}", _nvrtc_remedy(cupy))
    module = cupy.cuda.Module()
    try:
        module.load(code)
    except cupy.cuda.driver.CUDADriverError as problem:
        if problem.status not in _FOREIGN_CODE:
            raise
        detail = f"NVRTC is older than the device, which does not load its machine code: {_text(problem)}"
        return Finding("nvrtc", False, detail, _nvrtc_remedy(cupy))
    got = _run(cupy, module)
    if got == _RIGHT:
        return Finding("nvrtc", True, "a kernel is compiled, loaded and computes what it should")
    detail = f"a kernel computes {got[3]:.3g} and {got[5]:.3g} instead of {_RIGHT[3]:.3g} and {_RIGHT[5]:.3g}"
    return Finding("nvrtc", False, detail, "use --device cpu, and check the device with: nvidia-smi -q -d ECC")


def _run(cupy: Any, module: Any) -> tuple[float, ...]:
    runtime = cupy.cuda.runtime
    values = np.array(_GIVEN, np.float32)
    memory = cupy.cuda.Memory(values.nbytes)
    runtime.memcpy(memory.ptr, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice)
    module.get_function("stepwire_probe")((1,), (1,), (np.uint64(memory.ptr),))
    runtime.deviceSynchronize()
    runtime.memcpy(values.ctypes.data, memory.ptr, values.nbytes, runtime.memcpyDeviceToHost)
    return tuple(values.tolist())


def _examine_pinned_memory(asked: _Subject) -> Finding:
    cupy = _on_device(asked)
    try:
        cupy.cuda.PinnedMemory(_PINNED_BYTES)
    except Exception as problem:
        detail = f"1 MiB of host memory cannot be pinned: {_text(problem)}"
        return Finding("pinned memory", False, detail, _PINNED_REMEDY)
    return Finding("pinned memory", True, "1 MiB of host memory can be pinned")


def _examine_ipc(asked: _Subject) -> Finding:
    cupy = _on_device(asked)
    memory = cupy.cuda.Memory(_PINNED_BYTES)
    try:
        cupy.cuda.runtime.ipcGetMemHandle(memory.ptr)
    except Exception as problem:
        detail = f"device memory cannot be shared with other processes: {_text(problem)}"
        return Finding("ipc", False, detail, _IPC_REMEDY, optional=True)
    return Finding("ipc", True, "device memory can be shared with other processes", optional=True)


def _examine_free_memory(asked: _Subject) -> Finding:
    free_bytes, total_bytes = _on_device(asked).cuda.runtime.memGetInfo()
    detail = f"{_gib(free_bytes)} of {_gib(total_bytes)} are free"
    enough = free_bytes >= min(_ENOUGH_BYTES, _ENOUGH_SHARE * total_bytes)
    # A server works with the memory there is, and refuses sessions that do not fit.
    return Finding("free memory", enough, detail, "" if enough else _FREE_REMEDY, optional=True)


_GROUND: Final[dict[str, Callable[[_Subject], Finding]]] = {"driver": _examine_driver, "device": _examine_device}
_ABILITIES: Final[dict[str, Callable[[_Subject], Finding]]] = {
    "nvrtc": _examine_nvrtc,
    "pinned memory": _examine_pinned_memory,
    "ipc": _examine_ipc,
    "free memory": _examine_free_memory,
}
_OPTIONAL: Final = ("ipc", "free memory")


# --- words ----------------------------------------------------------------------------------------------------


def _extras() -> str:
    return ", or: ".join(f"{_install(major)} (driver {_DRIVERS[major]} or newer)" for major in sorted(_DRIVERS)[::-1])


def _nvrtc_remedy(cupy: Any) -> str:
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return f"pip install 'cuda-toolkit[nvrtc,cudart]=={major}.*'"


def _version(number: int) -> str:
    """Return a version as people write it: CUDA counts 13000 for 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.1f} GiB"


def _text(problem: BaseException) -> str:
    """Return an exception in one line of bearable length."""
    words = " ".join(f"{type(problem).__name__}: {problem}".split())
    return words if len(words) <= _LONGEST_TEXT else f"{words[:_LONGEST_TEXT]}…"
