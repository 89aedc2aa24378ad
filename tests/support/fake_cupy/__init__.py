"""A stand-in for CuPy over simulated devices: what the engine may ask of it, and nothing else.

Kernels run on the processor, through `cuda_shim`; everything runs as late, or as early, as it may. See `device` for how
that shows missing waits, and `driver` for what is asserted.
"""

from __future__ import annotations

import pathlib
import types
from typing import Any

from tests.support.fake_cupy import classes, driver
from tests.support.fake_libcuda import FakeLibcuda


class FakeCupy:
    """The parts of CuPy that the engine uses, and knobs and gauges for tests.

    Attributes:
        compiled: every source that was compiled.
        libcuda: the driver's own library over the same devices, as a process sees it.
    """

    __version__ = "14.2.0+fake"

    def __init__(
        self,
        directory: pathlib.Path,
        devices: int = 2,
        memory_bytes: int = 1 << 30,
        broken_compiler: bool = False,
        library: Any = None,
        order: str | tuple[str, int] = "lazy",
        processors: int = 4,
        capability: str = "90",
    ) -> None:
        """Pretend devices.

        Args:
            directory: the directory of compiled modules.
            devices: how many.
            memory_bytes: the memory of each.
            broken_compiler: every compilation fails, as without NVRTC.
            library: kernels to use, where it has them, instead of compiling the modules that are loaded.
            order: when operations run; see `device.Streams`.
            processors: multiprocessors of a device.
            capability: compute capability, as the two digits of CuPy.
        """
        self._driver = driver.Driver(directory, devices, memory_bytes, library, order, processors, capability)
        self._broken_compiler = broken_compiler
        self.libcuda = FakeLibcuda(self._driver)
        self.compiled: list[str] = []
        self.ndarray = classes.ndarray
        self.cuda = types.SimpleNamespace(
            **vars(self._driver.classes),
            get_current_stream=self._driver.stream,
            is_available=lambda: devices > 0,
            compiler=types.SimpleNamespace(compile_using_nvrtc=self._compile),
            driver=types.SimpleNamespace(
                CUDADriverError=classes.CUDADriverError,
                occupancyMaxActiveBlocksPerMultiprocessor=self._driver.occupancy,
            ),
            runtime=types.SimpleNamespace(
                CUDARuntimeError=classes.CUDARuntimeError,
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 13020,
                getDeviceCount=self._driver.count_devices,
                getDevice=self._driver.current_device,
                setDevice=self._driver.set_device,
                getDeviceProperties=self._driver.properties,
                deviceSynchronize=lambda: self._driver.synchronize(self._driver.device()),
                memGetInfo=lambda: self._driver.memory_of(self._driver.device()),
                hostRegister=self._driver.register,
                hostUnregister=self._driver.unregister,
                free=self._driver.free,
                ipcGetMemHandle=self._driver.share,
                memcpy=self._driver.copy_at_once,
                memcpyAsync=self._driver.copy_in_stream,
                memcpyHostToDevice=1,
                memcpyDeviceToHost=2,
            ),
        )

    # What tests look at.

    used_bytes = property(lambda self: self._driver.memories.used_bytes(driver.DEVICE_MEMORY))
    pinned_bytes = property(lambda self: self._driver.memories.used_bytes(driver.PINNED_MEMORY))
    registered_bytes = property(lambda self: self._driver.memories.used_bytes(driver.REGISTERED_MEMORY))
    allocations = property(lambda self: self._driver.memories.allocations)
    faults = property(lambda self: self._driver.memories.faults)

    def check(self) -> None:
        """Assert that there were no faults."""
        self._driver.memories.check()

    @property
    def contexts(self) -> set[int]:
        """The devices that have a context."""
        return self._driver.contexts

    @property
    def spinning_waits(self) -> int:
        """The number of waits of the driver's that take a whole core while they last."""
        return self._driver.spinning_waits

    def poison(self, error: BaseException) -> None:
        """Make every later call fail with this error, as after an illegal address."""
        self._driver.failures.poison(error)

    def fail_next(self, operation: str, error: BaseException, after: int = 0) -> None:
        """Make an operation raise an error, once; see `device.Failures`."""
        self._driver.failures.config(operation, error, after)

    def _compile(
        self,
        source: str,
        options: tuple[str, ...] = (),
        arch: str | None = None,
        filename: str = "kern.cu",
        name_expressions: Any = None,
        log_stream: Any = None,
        cache_in_memory: bool = False,
        jitify: Any = None,
        method: Any = None,
    ) -> tuple[bytes, None]:
        arch = arch or self.cuda.Device(self._driver.device()).compute_capability
        assert isinstance(options, tuple) and name_expressions is jitify is method is None
        assert not any("ftz=true" in option or "fast_math" in option for option in options), "subnormals must survive"
        if self._broken_compiler:
            raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open shared object")
        self.compiled.append(source)
        return f"fake cubin sm_{arch}\n{source}".encode(), None
