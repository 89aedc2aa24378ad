"""A kernel that fills memory, of the device or mapped, with one byte; it is Python, so no compiler is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepwire_server.engines.cuda.device import CudaDevice

__all__ = ["Filling", "fill"]

_SOURCE = 'extern "C" __global__ void fill(unsigned char *memory, long long nbytes, unsigned int value)'


class Filling:
    """A library for the stand-in for CuPy: `fake(library=Filling())`."""

    names = ("fill",)

    def launch(self, name: str, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        memory, nbytes, value = arguments
        memory[: int(nbytes)] = int(value)


def fill(device: CudaDevice, value: int, nbytes: int) -> Callable[[int], None]:
    """Return what asks the stream `compute` to fill as many bytes from an address on."""

    def launch(address: int) -> None:
        module = device.cupy.cuda.Module()
        module.load(device.cupy.cuda.compiler.compile_using_nvrtc(_SOURCE)[0])
        module.get_function("fill")((1,), (1,), (address, nbytes, np.uint32(value)), stream=device.compute)

    return launch
