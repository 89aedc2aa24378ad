"""Steps of rows of a table: compiled kernels have the bits of NumPy, which has those of the dense step on each row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.engines.protocol import Pass
from stepwire_server.rules import Precision
from tests.support import cuda_cases as cases
from tests.support import table_cases as tables


@pytest.fixture(scope="module")
def numpy_engine() -> Iterator[CpuEngine]:
    engine = CpuEngine(threads=2, use_numba=False)
    yield engine
    engine.close()


def test_rows_are_stepped_as_a_dense_range_is(numpy_engine: CpuEngine) -> None:
    """Each row by itself, with its moments faded by hand, and no other element of the state."""
    after, found = tables.stepped(numpy_engine), tables.step()
    recipe, plain = tables.RECIPE, tables.RECIPE.__class__(tables.RECIPE.rule, limits=True, measures=True)
    arrays = cases.make_arrays(recipe, tables.SIZE, odd=False)
    want = {slot: arrays[slot].copy() for slot in (PARAM, *recipe.slots)}
    for turn, first in enumerate((0, 3)):
        for place, row in enumerate(tables.ROWS[first:].tolist()):
            scalars = found.scalars[found.kinds[first + place]].tolist()
            start = tables.TABLE.start + row * tables.WIDTH
            here = slice(start, start + tables.WIDTH)
            for slot, fade in zip(recipe.faded, scalars[3:5], strict=True):
                want[slot][here] *= np.float32(fade)
            state = numpy_engine.allocate(dict.fromkeys(want, Precision.FLOAT32), tables.SIZE)
            for slot, values in want.items():
                state.write(slot, 0, values)
            gradient = arrays["gradient"][(2 - 2 * turn + place) * tables.WIDTH :][: tables.WIDTH]
            step = Pass(plain, (*scalars[:3], *scalars[5:]))
            state.update(step, start, state.receive().put(0, gradient), 0, tables.WIDTH, None)
            for slot, values in want.items():
                state.read(slot, 0, values)
    for slot, values in want.items():
        cases.assert_same_bits(after[slot].copy(), values, slot)


def test_compiled_kernels_have_the_bits_of_numpy(numpy_engine: CpuEngine) -> None:
    pytest.importorskip("numba")
    engine = CpuEngine(threads=2, use_numba=True)
    try:
        tables.assert_same(tables.stepped(engine), tables.stepped(numpy_engine))
        tables.assert_any_order(engine)
    finally:
        engine.close()


def test_a_row_may_have_numbers_of_its_own(numpy_engine: CpuEngine) -> None:
    tables.assert_same(tables.stepped(numpy_engine, own=True), tables.stepped(numpy_engine))


def test_rows_come_in_any_order(numpy_engine: CpuEngine) -> None:
    tables.assert_any_order(numpy_engine)


def test_rows_outside_the_table_are_refused(numpy_engine: CpuEngine) -> None:
    state = numpy_engine.allocate({PARAM: Precision.FLOAT32}, tables.SIZE)
    for rows in ([-1], [0, 400]):
        with pytest.raises(IndexError, match="outside the 400"):
            state.read_rows(PARAM, tables.TABLE, np.array(rows), np.empty(len(rows) * tables.WIDTH, np.float32))
