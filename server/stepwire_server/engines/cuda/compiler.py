"""CUDA C made into machine code once, and kept in a file. Unverified on a GPU.

CuPy compiles by itself, but always with `-ftz=true`: subnormal numbers would count as zero on a GPU and nowhere else.
So NVRTC is asked directly here, through CuPy, and the code is loaded as it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from stepwire.errors import ResourceExhaustedError
from stepwire_server.config import ENVIRONMENT
from stepwire_server.engines.compiled.cache import kernel_directory
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.source import COMPILE_OPTIONS

__all__ = ["Compiler", "cubin_directory"]

_log = logging.getLogger(__name__)


class Compiler:
    """Compiles for one device. Thread-safe.

    Attributes:
        compiled: the number of modules that were compiled and not found in a file.
        loaded_bytes: the machine code that is on the device; the driver may round it up.
    """

    def __init__(self, device: CudaDevice, directory: pathlib.Path | None = None) -> None:
        """Compile for a device.

        Args:
            device: the device.
            directory: the directory of machine code; None for `cubin_directory()`.
        """
        self.compiled = 0
        self.loaded_bytes = 0
        self._device = device
        self._directory = directory or cubin_directory()
        with device.current():
            capability = device.cupy.cuda.Device(device.index).compute_capability
        runtime = device.cupy.cuda.runtime.runtimeGetVersion()
        self._target = f"{device.cupy.__version__} {runtime} sm_{capability} {' '.join(COMPILE_OPTIONS)}"

    def load(self, name: str, source: str) -> Any:
        """Return a module of machine code, with `get_function(name)`.

        Args:
            name: the beginning of the name of its file.
            source: the module in CUDA C.

        Raises:
            ResourceExhaustedError: the device has no memory left for the code.
            DataLossError: the device is lost.
            Exception: NVRTC is missing, or does not compile the source.
        """
        digest = hashlib.sha256(f"{self._target}\n{source}".encode()).hexdigest()
        path = self._directory / f"{name[:100]}_{digest[:16]}.cubin"
        with self._device.current():
            if (module := self._known(path)) is not None:
                return module
            code, _ = self._device.cupy.cuda.compiler.compile_using_nvrtc(
                source, COMPILE_OPTIONS, filename="stepwire.cu", cache_in_memory=True
            )
            self.compiled += 1
            module = self._loaded(code)
        _keep(path, code)
        return module

    def _known(self, path: pathlib.Path) -> Any | None:
        """Load a file's code, or return None where there is none that the driver loads.

        Raises:
            ResourceExhaustedError: the device has no memory left for the code.
            DataLossError: the device is lost.
        """
        try:
            code = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self._loaded(code)
        except ResourceExhaustedError:  # of the device, which says nothing about the file
            raise
        except Exception as problem:  # CuPy has no common base for what a driver refuses
            self._device.examine(problem)
            _log.warning("machine code in %s is made anew: %s", path, problem)
            return None

    def _loaded(self, code: bytes) -> Any:
        module = self._device.cupy.cuda.Module()
        self._device.with_memory(lambda: module.load(code), len(code))
        self.loaded_bytes += len(code)
        return module


def cubin_directory(environ: Mapping[str, str] = ENVIRONMENT) -> pathlib.Path:
    """Return the directory for machine code: `$CUPY_CACHE_DIR`, else that of all generated kernels.

    Either has to belong to this user alone; see `compiled.cache`.
    """
    chosen = environ.get("CUPY_CACHE_DIR")
    return kernel_directory({**environ, "STEPWIRE_CACHE_DIR": chosen} if chosen else environ)


def _keep(path: pathlib.Path, code: bytes) -> None:
    """Write a file that others see whole or not at all; a place that cannot be written is done without."""
    try:
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(code)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as problem:
        _log.warning("machine code is not kept in %s: %s", path.parent, problem)
