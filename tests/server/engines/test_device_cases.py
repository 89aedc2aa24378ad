"""What `test_gpu` asks of a GPU, asked of the stand-in for CuPy in small: so that it is known to pass somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire_server.engines import CpuEngine, CudaEngine
from stepwire_server.engines.cuda.engine import CudaOptions
from stepwire_server.rules import Precision, Recipe
from tests.support import device_cases as cases

SIZE = 3001


@pytest.fixture
def engine(fake_cupy: Callable[..., Any]) -> Iterator[CudaEngine]:
    cupy = fake_cupy(memory_bytes=4 << 20)
    engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32))
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
