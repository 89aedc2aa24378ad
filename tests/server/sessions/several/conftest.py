"""The engine of all workers' sessions in these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stepwire_server.engines.cpu.engine import CpuEngine


@pytest.fixture(scope="module")
def engine() -> Iterator[CpuEngine]:
    engine = CpuEngine(threads=1, use_numba=False)
    yield engine
    engine.close()
