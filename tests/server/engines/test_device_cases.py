"""What `test_gpu` asks of a GPU, asked of the stand-in for CuPy in small: so that it is known to pass somewhere."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.transports.cuda.driver import CudaDriver
from stepwire_server.engines import CpuEngine, CudaEngine
from stepwire_server.engines.cuda.engine import CudaOptions
from stepwire_server.rules import Precision, Recipe
from tests.support import device_cases as cases
from tests.support import ipc_child, sticky_child
from tests.support.time_left import TimeLeft

SIZE = 3001


@pytest.fixture
def engine(fake_cupy: Callable[..., Any]) -> Iterator[CudaEngine]:
    cupy = fake_cupy(memory_bytes=4 << 20)
    engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32), cupy.libcuda)
    yield engine
    engine.close()
    cupy.check()


@pytest.fixture(scope="module")
def reference() -> Iterator[CpuEngine]:
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


def test_load(engine, reference) -> None:
    cases.check_load(engine, reference, SIZE, most=512)


def test_shortage(engine, reference) -> None:
    cases.check_shortage(engine, reference, SIZE)


def test_zeroed(engine) -> None:
    cases.check_zeroed(engine, SIZE)


@pytest.mark.parametrize("precision", Precision)
def test_accounting(engine, precision) -> None:
    cases.check_accounting(engine, Recipe(cases.ADAM.rule, precision=precision), SIZE)


@pytest.mark.parametrize("precision", Precision)
def test_moves(engine, reference, precision) -> None:
    cases.check_moves(engine, reference, precision, SIZE)


def test_mixed(engine, reference) -> None:
    cases.check_mixed(engine, reference, 4001)


class _Wrapped:
    """An array as `cupy.asarray` makes one of a view: its address, and copies from the host."""

    def __init__(self, view: Any) -> None:
        (address, _), (self._size,) = view.__cuda_array_interface__["data"], view.__cuda_array_interface__["shape"]
        self.data = types.SimpleNamespace(ptr=address)

    def set(self, values: np.ndarray) -> None:
        assert values.size == self._size
        ctypes.memmove(self.data.ptr, values.ctypes.data, values.nbytes)


class _Beside:
    """A client in this process, whose CuPy has nothing that needs a kernel."""

    def __init__(self, libcuda: Any, told: dict[str, Any]) -> None:
        self._told, self._mapping = told, ipc_child.open_memory(told, CudaDriver(libcuda))
        ipc_child.write(self._mapping, types.SimpleNamespace(asarray=_Wrapped), told["size"])

    def parameters(self) -> np.ndarray:
        return ipc_child.read(self._mapping, self._told["at"], self._told["size"])

    def close(self) -> None:
        del self._mapping


def test_time() -> None:
    """The tests of a GPU that come too late are skipped by name."""
    seconds = iter([100.0, 430.0, 430.5])
    left = TimeLeft({"STEPWIRE_GPU_SECONDS": "330"}, lambda: next(seconds))
    left.require("in time")
    with pytest.raises(pytest.skip.Exception, match=r"left out, 330 seconds were over: test_late\[8\]"):
        left.require("test_late[8]")
    TimeLeft({}, lambda: 1e9).require("with all the time of the world")


def test_lost(fake_cupy) -> None:
    cupy = fake_cupy(memory_bytes=16 << 20)
    engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32), cupy.libcuda)
    poison = cupy.cuda.runtime.CUDARuntimeError(700)
    cases.check_lost(sticky_child.outcomes(engine, lambda state: cupy.poison(poison)))


def test_shared(engine, reference) -> None:
    cupy = engine._resources.device.cupy
    cases.check_shared(engine, reference, SIZE, lambda told: _Beside(cupy.libcuda, told))
    assert cupy.libcuda.mapped == {}
