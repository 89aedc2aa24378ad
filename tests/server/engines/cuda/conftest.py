"""The stand-in for CuPy, for the tests of the engine's parts beside."""

from __future__ import annotations

import gc
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.fake_cupy import FakeCupy

PATIENCE_SECONDS = 120.0

Fake = Callable[..., Any]


@pytest.fixture(scope="session")
def directory(kernel_directory: pathlib.Path) -> pathlib.Path:
    """The directory of compiled kernels, which outlives a run."""
    return kernel_directory


@pytest.fixture
def fake(request: pytest.FixtureRequest, directory: pathlib.Path) -> Iterator[Fake]:
    """Make stand-ins for CuPy: `fake(order="lazy", **options)`.

    At the end there must have been no faults, and all memory must have gone with the test's variables. So a test waits
    for what it asked for before it returns.
    """
    made: list[Any] = []
    failed = request.session.testsfailed

    def make(order: str | tuple[str, int] = "lazy", **options: Any) -> Any:
        made.append(FakeCupy(directory, order=order, **options))
        return made[-1]

    yield make
    if request.session.testsfailed > failed:
        return  # the traceback holds the test's variables; and the first failure is the one to read
    if any(map(_held, made)):
        gc.collect()  # what is in cycles
    for cupy in made:
        cupy.check()
        assert _held(cupy) == 0, "memory was left behind"


def _held(cupy: Any) -> int:
    held: int = cupy.used_bytes + cupy.pinned_bytes + cupy.registered_bytes
    return held


@pytest.fixture(scope="session")
def read() -> Callable[[Any, Any], np.ndarray]:
    """Bring device memory to the host: `read(device, array)`, behind all that the kernels' stream was asked for."""

    def bring(device: Any, array: Any) -> np.ndarray:
        host = device.pinned(max(array.nbytes, 1))
        with device.current():
            array.data.copy_to_host_async(host.ctypes.data, array.nbytes, device.compute)
            device.compute.synchronize()
        return host[: array.nbytes].view(array.dtype).copy()

    return bring


@pytest.fixture(scope="session")
def settle() -> Callable[[Any], None]:
    """Wait for all that a device was asked for."""

    def wait(device: Any) -> None:
        with device.current():
            device.cupy.cuda.Device(device.index).synchronize()

    return wait


@pytest.fixture(scope="session")
def together() -> Callable[..., None]:
    """Run functions in a thread each. That one does not end, because it waits for what never comes, is a failure."""

    def run(*functions: Callable[[], None]) -> None:
        problems: list[BaseException] = []
        start = threading.Barrier(len(functions))

        def work(function: Callable[[], None]) -> None:
            try:
                start.wait()
                function()
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(function,), daemon=True) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a thread waits for what never comes"
        for problem in problems:
            raise problem

    return run
