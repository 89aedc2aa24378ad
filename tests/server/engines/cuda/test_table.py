"""Steps of rows of a table on a pretended GPU: every bit is NumPy's, in every order in which a device may work."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from stepwire_server.engines import CpuEngine
from stepwire_server.engines.cuda.source import gather_kernels, table_kernel
from tests.server.pretended_gpus import PretendedGpu, library_of, needs_compiler
from tests.support import table_cases as tables

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library(directory: pathlib.Path) -> Any:
    """The kernels of tables."""
    replies = (None, tables.REPLY.name)
    return library_of([*(table_kernel(tables.RECIPE, reply) for reply in replies), *gather_kernels()], directory)


@pytest.mark.parametrize("order", ["lazy", "greedy", ("random", 1)], ids=str)
def test_rows_have_the_bits_of_numpy(fake: Callable[..., Any], library: Any, order: Any) -> None:
    reference = CpuEngine(threads=1, use_numba=False)
    engine = PretendedGpu(fake(order, library=library))
    tables.assert_same(tables.stepped(engine), tables.stepped(reference))
    tables.assert_same(tables.stepped(engine, own=True), tables.stepped(reference))
    tables.assert_any_order(engine)
    reference.close()


def test_replies_cross_the_bus_in_parts_of_whole_rows(fake: Callable[..., Any], library: Any) -> None:
    reference = CpuEngine(threads=1, use_numba=False)
    engine = PretendedGpu(fake("lazy", library=library))
    engine._resources.bus.buffer_bytes = 2 * tables.WIDTH * tables.REPLY.itemsize + 1
    for own in (False, True):
        tables.assert_same(tables.stepped(engine, own=own), tables.stepped(reference))
    reference.close()
