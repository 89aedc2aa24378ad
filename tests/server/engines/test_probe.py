"""Each way in which CUDA is known to be missing or broken, played by stand-ins: what is told, and the remedy."""

from __future__ import annotations

import ctypes
import pathlib
import sys
import tomllib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.probe import Finding, Surroundings, examine_cuda, look_around, visible_gpus

GIB = 1 << 30
INSTALL_12, INSTALL_13 = (f"pip install cupy-cuda{n}x 'cuda-toolkit[nvrtc,cudart]=={n}.*'" for n in (12, 13))
SURROUNDED = Surroundings(driver_library=True, device_nodes=True)
CHECKS = ["cupy", "driver", "device", "nvrtc", "pinned memory", "ipc", "free memory"]
GPUS = "check the host with: nvidia-smi; in a container use: docker run --gpus all"


class CUDADriverError(RuntimeError):
    """As CuPy's of the driver."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class CUDARuntimeError(RuntimeError):
    """As CuPy's: a number and its words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class DynamicLibNotFoundError(RuntimeError):
    """As cuda-pathfinder's."""


INSUFFICIENT = CUDARuntimeError(
    35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")


def raising(problem: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise problem

    return fail


class Memory:
    """Device memory, in the host's."""

    def __init__(self, size: int) -> None:
        self.buffer = ctypes.create_string_buffer(size)
        self.ptr = ctypes.addressof(self.buffer)


def computing(arithmetic: type[np.floating[Any]], flush: bool = False) -> Callable[..., Any]:
    """Make the module class of a device with this arithmetic."""

    def kernel(grid: Any, block: Any, arguments: tuple[np.uint64]) -> None:
        place = ctypes.cast(int(arguments[0]), ctypes.POINTER(ctypes.c_float))
        x = np.ctypeslib.as_array(place, (6,))
        x[3] = arithmetic(x[0]) * arithmetic(x[1]) + arithmetic(x[2])
        x[5] = 0.0 if flush else x[4] * np.float32(0.5)

    class Module:
        def load(self, cubin: bytes) -> None:
            assert cubin == b"machine code"
            self.get_function = {"stepwire_probe": kernel}.__getitem__

    return Module


def refusing(problem: Exception) -> Callable[..., Any]:
    """Make the module class of a driver that does not take the code."""
    return lambda: types.SimpleNamespace(load=raising(problem))


def gpu(module: Any = None, compile_using_nvrtc: Any = None, pinned: Any = None, **runtime: Any) -> Any:
    """Make a CuPy with two healthy GPUs; what is given is broken."""

    def compiled(source: str, options: tuple[str, ...], cache_in_memory: bool) -> tuple[bytes, None]:
        assert (options, cache_in_memory, "stepwire_probe" in source) == (("--fmad=false",), True, True)
        return b"machine code", None

    healthy = {
        "runtimeGetVersion": lambda: 13020,
        "driverGetVersion": lambda: 13000,
        "getDeviceCount": lambda: 2,
        "getDevice": lambda: 0,
        "setDevice": lambda index: None,
        "getDeviceProperties": lambda index: {"name": b"Pretended GPU", "major": 9, "minor": 0},
        "memcpy": lambda target, source, size, kind: ctypes.memmove(target, source, size),
        "memcpyHostToDevice": 1,
        "memcpyDeviceToHost": 2,
        "deviceSynchronize": lambda: None,
        "ipcGetMemHandle": lambda pointer: bytes(64),
        "memGetInfo": lambda: (40 * GIB, 80 * GIB),
    }
    return types.SimpleNamespace(
        __version__="14.2.0",
        cuda=types.SimpleNamespace(
            runtime=types.SimpleNamespace(**healthy | runtime),
            compiler=types.SimpleNamespace(compile_using_nvrtc=compile_using_nvrtc or compiled),
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            Memory=Memory,
            Module=module or computing(np.float32),
            PinnedMemory=pinned or (lambda size: None),
        ),
    )


def last(cupy: Any, index: int = 0, around: Surroundings = SURROUNDED) -> Finding:
    """The finding at which the probe stops."""
    findings = examine_cuda(index, cupy, around)
    assert [finding.check for finding in findings] == CHECKS[: len(findings)]
    assert all(finding.ok and not finding.remedy for finding in findings[:-1])
    assert "\n" not in findings[-1].detail
    return findings[-1]


def only(cupy: Any) -> Finding:
    """The one finding that is not well; all checks were made."""
    findings = examine_cuda(0, cupy, SURROUNDED)
    assert [finding.check for finding in findings] == CHECKS
    (wrong,) = [finding for finding in findings if not finding.ok]
    assert "\n" not in wrong.detail
    return wrong


def test_a_gpu_that_works() -> None:
    assert examine_cuda(1, gpu(), SURROUNDED) == [
        Finding("cupy", True, "CuPy 14.2.0 for CUDA 13.2"),
        Finding("driver", True, "NVIDIA driver for CUDA 13.0"),
        Finding("device", True, "cuda:1 is Pretended GPU, compute capability 9.0"),
        Finding("nvrtc", True, "a kernel is compiled, loaded and computes what it should"),
        Finding("pinned memory", True, "1 MiB of host memory can be pinned"),
        Finding("ipc", True, "device memory can be shared with other processes", optional=True),
        Finding("free memory", True, "40.0 GiB of 80.0 GiB are free", optional=True),
    ]


def test_cupy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    (finding,) = examine_cuda(0)
    assert (finding.check, finding.ok, finding.optional) == ("cupy", False, False)
    assert finding.detail.startswith("CuPy cannot be imported: ModuleNotFoundError: ")
    assert finding.remedy == (f"{INSTALL_13} (driver 580 or newer), or: {INSTALL_12} (driver 525 or newer)")


def test_cupy_is_there_and_broken() -> None:
    finding = last(gpu(runtimeGetVersion=raising(ImportError("libcudart.so.13:\n  cannot open"))))
    assert finding[:3] == ("cupy", False, "ImportError: libcudart.so.13: cannot open")
    assert finding.remedy.startswith(INSTALL_13)


NO_DRIVERS = {
    "nothing": (
        Surroundings(False, False),
        "no NVIDIA driver: libcuda.so.1 does not load and there is no /dev/nvidia0",
        "install the NVIDIA driver and check it with: nvidia-smi; in a container, install nvidia-container-toolkit on "
        "the host and use: docker run --gpus all",
    ),
    "device files alone": (
        Surroundings(False, True),
        "there are device files, but libcuda.so.1 does not load: the driver's libraries are missing",
        "reinstall the driver; in a container use: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ),
    "a library alone": (
        Surroundings(True, False),
        "libcuda.so.1 loads, but no driver answers behind it; it may be the stub of a CUDA toolkit",
        "unset LD_LIBRARY_PATH, and check the driver with: nvidia-smi",
    ),
}


@pytest.mark.parametrize("what", NO_DRIVERS)
def test_no_driver(what: str) -> None:
    around, detail, remedy = NO_DRIVERS[what]
    cupy = gpu(driverGetVersion=lambda: 0, getDeviceCount=raising(INSUFFICIENT))
    assert last(cupy, around=around) == Finding("driver", False, detail, remedy)


@pytest.mark.parametrize(
    ("driver", "runtime", "detail", "remedy"),
    [
        (
            12020,
            13020,
            "the NVIDIA driver is for CUDA 12.2, CuPy for CUDA 13.2",
            f"install NVIDIA driver 580 or newer, or: pip uninstall -y cupy-cuda13x && {INSTALL_12}",
        ),
        (
            11080,
            12090,
            "the NVIDIA driver is for CUDA 11.8, CuPy for CUDA 12.9",
            "install NVIDIA driver 525 or newer",
        ),
        (
            13010,
            14000,
            "the NVIDIA driver is for CUDA 13.1, CuPy for CUDA 14.0",
            "install a newer NVIDIA driver",
        ),
    ],
)
def test_the_driver_is_too_old(driver: int, runtime: int, detail: str, remedy: str) -> None:
    cupy = gpu(
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: runtime,
        getDeviceCount=raising(INSUFFICIENT),
    )
    assert last(cupy) == Finding("driver", False, detail, remedy)


@pytest.mark.parametrize(
    ("visible", "detail", "remedy"),
    [
        (None, "NVIDIA driver for CUDA 13.0, but no device", GPUS),
        (
            "",
            "NVIDIA driver for CUDA 13.0, but no device (CUDA_VISIBLE_DEVICES='')",
            f"unset CUDA_VISIBLE_DEVICES; {GPUS}",
        ),
    ],
)
def test_a_driver_without_devices(visible: str | None, detail: str, remedy: str) -> None:
    around = Surroundings(True, False, visible)
    assert last(gpu(getDeviceCount=raising(NO_DEVICE)), around=around) == Finding("driver", False, detail, remedy)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (802, "sudo systemctl start nvidia-fabricmanager"),
        (803, "sudo reboot: the driver was updated, and its old kernel module still runs"),
        (804, "unset LD_LIBRARY_PATH: a CUDA compatibility package hides the libcuda.so.1 of the driver"),
        (999, "check the driver and the device with: nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start(status: int, remedy: str) -> None:
    cupy = gpu(getDeviceCount=raising(CUDARuntimeError(status, "cudaErrorSomething: words")))
    detail = "NVIDIA driver for CUDA 13.0, but CUDARuntimeError: cudaErrorSomething: words"
    assert last(cupy) == Finding("driver", False, detail, remedy)


@pytest.mark.parametrize(
    ("count", "seen", "remedy"),
    [
        (0, "no device", GPUS),
        (1, "one device, cuda:0", f"use --device cuda:0, or: {GPUS}"),
        (2, "2 devices, cuda:0 to cuda:1", f"use --device cuda:0, or: {GPUS}"),
    ],
)
def test_no_such_device(count: int, seen: str, remedy: str) -> None:
    finding = last(gpu(getDeviceCount=lambda: count), index=2)
    assert finding == Finding("device", False, f"there is no cuda:2: CUDA sees {seen}", remedy)


def test_a_device_that_is_hidden() -> None:
    finding = last(gpu(), index=2, around=Surroundings(True, True, "0,1"))
    assert finding.detail == "there is no cuda:2: CUDA sees 2 devices, cuda:0 to cuda:1 (CUDA_VISIBLE_DEVICES='0,1')"
    assert finding.remedy == f"use --device cuda:0, or: unset CUDA_VISIBLE_DEVICES; {GPUS}"


def test_the_visible_devices_are_shown() -> None:
    findings = examine_cuda(0, gpu(), Surroundings(True, True, "3"))
    assert findings[2].detail == "cuda:0 is Pretended GPU, compute capability 9.0 (CUDA_VISIBLE_DEVICES='3')"


@pytest.mark.parametrize(
    ("runtime", "capability", "oldest", "remedy"),
    [
        (
            13020,
            (7, 0),
            "CUDA 13 compiles for 7.5",
            f"pip uninstall -y cupy-cuda13x && {INSTALL_12}",
        ),
        (12090, (3, 7), "CUDA 12 compiles for 5.0", "use --device cpu"),
    ],
)
def test_a_device_that_is_too_old(runtime: int, capability: tuple[int, int], oldest: str, remedy: str) -> None:
    properties = {"name": b"Old GPU", "major": capability[0], "minor": capability[1]}
    cupy = gpu(runtimeGetVersion=lambda: runtime, getDeviceProperties=lambda index: properties)
    shown = f"cuda:0 is Old GPU, compute capability {capability[0]}.{capability[1]}; {oldest} and newer"
    assert last(cupy) == Finding("device", False, shown, remedy)


def test_nvrtc_is_missing() -> None:
    text = 'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13 or libnvrtc.so.12\n'
    finding = only(gpu(compile_using_nvrtc=raising(DynamicLibNotFoundError(text))))
    assert finding == Finding(
        "nvrtc",
        False,
        f"NVRTC does not compile: DynamicLibNotFoundError: {text.strip()}",
        "pip install 'cuda-toolkit[nvrtc,cudart]==13.*'",
    )


def test_nvrtc_of_another_cuda() -> None:
    cupy = gpu(runtimeGetVersion=lambda: 12080, compile_using_nvrtc=raising(RuntimeError("no libnvrtc.so.12")))
    assert only(cupy).remedy == "pip install 'cuda-toolkit[nvrtc,cudart]==12.*'"


def test_a_compiler_with_much_to_say_is_cut_short() -> None:
    finding = only(gpu(compile_using_nvrtc=raising(ValueError("error: no\n" * 1000))))
    assert finding.detail.startswith("NVRTC does not compile: ValueError: error: no error: no ")
    assert finding.detail.endswith("…")
    assert len(finding.detail) < 400


@pytest.mark.parametrize(
    ("module", "computed"),
    [
        (computing(np.float64), "5.96e-08 and 3.59e-43"),  # contracts a·b + c
        (computing(np.float32, flush=True), "0 and 0"),  # flushes subnormal numbers
    ],
)
def test_a_kernel_that_computes_wrongly(module: Any, computed: str) -> None:
    assert only(gpu(module=module)) == Finding(
        "nvrtc",
        False,
        f"a kernel computes {computed} instead of 0 and 3.59e-43",
        "use --device cpu, and check the device with: nvidia-smi -q -d ECC",
    )


def test_a_compiler_older_than_the_device() -> None:
    """It compiles for the newest device that it knows, and the driver does not load that."""
    finding = only(gpu(module=refusing(CUDADriverError(209, "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image"))))
    detail = "CUDADriverError: CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image"
    assert finding[:2] == ("nvrtc", False)
    assert finding.detail == f"NVRTC is older than the device, which does not load its machine code: {detail}"
    assert finding.remedy == "pip install 'cuda-toolkit[nvrtc,cudart]==13.*'"


def test_a_kernel_that_does_not_load() -> None:
    finding = only(gpu(module=refusing(CUDADriverError(2, "CUDA_ERROR_OUT_OF_MEMORY: out of memory"))))
    assert finding[:3] == ("nvrtc", False, "CUDADriverError: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    assert finding.remedy == "check the driver and the device with: nvidia-smi"


def test_pinned_memory_is_refused() -> None:
    problem = CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory")
    assert only(gpu(pinned=raising(problem))) == Finding(
        "pinned memory",
        False,
        "1 MiB of host memory cannot be pinned: CUDARuntimeError: cudaErrorMemoryAllocation: out of memory",
        "ulimit -l unlimited; in a container use: docker run --ulimit memlock=-1",
    )


def test_ipc_is_refused() -> None:
    problem = CUDARuntimeError(801, "cudaErrorNotSupported: operation not supported")
    assert only(gpu(ipcGetMemHandle=raising(problem))) == Finding(
        "ipc",
        False,
        "device memory cannot be shared with other processes: CUDARuntimeError: cudaErrorNotSupported: "
        "operation not supported",
        "in a container use: docker run --ipc=host --pid=host; under WSL there is no CUDA IPC, and clients use gRPC",
        optional=True,
    )


def test_little_memory_is_free() -> None:
    assert only(gpu(memGetInfo=lambda: (GIB // 2, 80 * GIB))) == Finding(
        "free memory",
        False,
        "0.5 GiB of 80.0 GiB are free",
        "see which processes hold it with: nvidia-smi; or keep sessions small with: --memory-budget 512M",
        optional=True,
    )


@pytest.mark.parametrize("free_and_total", [(GIB, 80 * GIB), (GIB // 4, 2 * GIB)])
def test_a_gibibyte_or_a_tenth_is_enough(free_and_total: tuple[int, int]) -> None:
    assert all(finding.ok for finding in examine_cuda(0, gpu(memGetInfo=lambda: free_and_total), SURROUNDED))


@pytest.mark.parametrize("broken", ["driverGetVersion", "getDeviceProperties", "memcpy", "memGetInfo"])
def test_nothing_raises(broken: str) -> None:
    findings = examine_cuda(0, gpu(**{broken: raising(OSError("unheard of"))}), SURROUNDED)
    (finding,) = [finding for finding in findings if not finding.ok]
    assert (finding.detail, finding.remedy) == (
        "OSError: unheard of",
        "check the driver and the device with: nvidia-smi",
    )


def test_looking_around(tmp_path: pathlib.Path) -> None:
    missing = raising(OSError("libcuda.so.1: cannot open shared object file"))
    assert look_around({}, tmp_path, missing) == Surroundings(False, False, None)
    (tmp_path / "nvidiactl").touch()
    assert not look_around({}, tmp_path, missing).device_nodes
    (tmp_path / "nvidia0").touch()
    seen = look_around({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path, lambda name: name)
    assert seen == Surroundings(True, True, "1")


def test_wsl_has_one_device_file_for_all_gpus(tmp_path: pathlib.Path) -> None:
    (tmp_path / "dxg").touch()
    assert look_around({}, tmp_path, lambda name: name).device_nodes


def test_visible_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus(gpu()) == range(2)
    assert visible_gpus(gpu(getDeviceCount=lambda: 0)) == range(1)
    assert visible_gpus(gpu(getDeviceCount=raising(NO_DEVICE))) == range(1)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert visible_gpus() == range(1)


@pytest.mark.parametrize(("major", "install"), [(12, INSTALL_12), (13, INSTALL_13)])
def test_a_remedy_installs_what_the_extra_has(major: int, install: str) -> None:
    """No index has stepwire, so remedies name the packages."""
    project = tomllib.loads((pathlib.Path(__file__).parents[3] / "pyproject.toml").read_text())
    _, cupy, toolkit = project["project"]["optional-dependencies"][f"cuda{major}"]
    assert install == f"pip install {cupy.partition('>')[0]} '{toolkit}'"
