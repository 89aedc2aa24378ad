"""Sums come to the host through cells that are used again, and none of them is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.sums import CELL_BYTES, Cells, Figures, UnreadFigures
from tests.server.engines.cuda.filling import Filling, fill

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]
BATCH_BYTES = 32 * CELL_BYTES

every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


@pytest.fixture
def fake(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make stand-ins whose kernel needs no compiler."""
    return lambda order="lazy": fake(order, library=Filling())


def figures(
    device: CudaDevice,
    cells: Cells,
    value: int,
    count: int = 4,
    dtype: Any = np.uint8,
    unread: UnreadFigures | None = None,
) -> Figures[list[int]]:
    """Ask for some numbers, every byte of which is `value`; they are noted apart from all others."""
    launch = fill(device, value, count * np.dtype(dtype).itemsize)
    with device.current():
        return Figures(cells, unread or UnreadFigures(1), launch, np.ndarray.tolist, count, np.dtype(dtype))


def free_cells(cells: Cells) -> int:
    return len(cells._cells)


@every_order
@pytest.mark.parametrize(
    ("count", "dtype"), [(0, np.float32), (1, np.float64), (7, np.float32), (CELL_BYTES // 8, np.float64)]
)
def test_figures_are_what_the_kernel_left(fake, order, count, dtype) -> None:
    device = CudaDevice(fake(order), 0)
    cells, asked = Cells(device, 32), []
    for value in (0x40, 0x41, 0x42):
        asked.append(figures(device, cells, value, count, dtype))
    for value, each in zip((0x40, 0x41, 0x42), asked, strict=True):
        expected = np.full(count * np.dtype(dtype).itemsize, value, np.uint8).view(dtype)
        assert each.wait() == expected.tolist()


@every_order
def test_figures_are_waited_for_in_any_order_and_twice(fake, order) -> None:
    device = CudaDevice(fake(order), 0)
    cells = Cells(device, 32)
    asked = [figures(device, cells, value) for value in range(5)]
    for value in (3, 0, 4, 1, 2, 3, 0):
        assert asked[value].wait() == [value] * 4
    assert free_cells(cells) == 32, "a cell is given back once"
    again = [figures(device, cells, 10 + value) for value in range(5)]
    assert [each.wait() for each in asked] == [[value] * 4 for value in range(5)], "they are not those of the next"
    assert [each.wait()[0] for each in again] == [10, 11, 12, 13, 14]


def test_figures_are_not_read_before_they_have_arrived(fake) -> None:
    """Without the wait, they would be those of before."""
    wrong = []
    for order in ORDERS:
        device = CudaDevice(fake(order), 0)
        cells = Cells(device, 32)
        device.wait = lambda event: None  # type: ignore[method-assign]
        wrong += [order] if [figures(device, cells, value).wait() for value in (1, 2)] != [[1] * 4, [2] * 4] else []
        with device.current():
            device.compute.synchronize()
    assert "lazy" in wrong and "eager" not in wrong


@every_order
def test_a_cell_is_used_again_and_again(fake, order) -> None:
    cupy = fake(order)
    device = CudaDevice(cupy, 0)
    cells = Cells(device, 32)
    assert (cupy.used_bytes, cupy.pinned_bytes) == (0, BATCH_BYTES)
    for turn in range(100):
        assert figures(device, cells, turn).wait() == [turn] * 4
    assert (cupy.used_bytes, cupy.pinned_bytes) == (0, BATCH_BYTES)


@every_order
def test_there_are_as_many_cells_as_have_been_needed_at_a_time(fake, order) -> None:
    cupy = fake(order)
    device = CudaDevice(cupy, 0)
    cells = Cells(device, 32)
    for _ in range(2):
        asked = [figures(device, cells, value) for value in range(70)]
        assert (cupy.used_bytes, cupy.pinned_bytes) == (0, 3 * BATCH_BYTES)
        assert [each.wait() for each in asked] == [[value] * 4 for value in range(70)]
    assert free_cells(cells) == 96
    assert cupy.pinned_bytes < cells.most_bytes


def test_cells_do_not_overlap(fake) -> None:
    cells = Cells(CudaDevice(fake(), 0), 32)
    taken = [cells.acquire(lambda: None) for _ in range(40)]
    places = sorted(cell.address for cell in taken)
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= CELL_BYTES
    assert all(cell.host.nbytes == CELL_BYTES for cell in taken)


@pytest.mark.parametrize("failing", ["launch", "kernel"])
def test_what_is_not_launched_gives_its_cell_back(fake, failing) -> None:
    cupy = fake()
    device, broken = CudaDevice(cupy, 0), cupy.cuda.runtime.CUDARuntimeError(98)
    cells = Cells(device, 32)

    def launch(address: int) -> None:
        raise broken

    for _ in range(40):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
            if failing == "launch":
                with device.current():
                    Figures(cells, UnreadFigures(1), launch, list, 1)
            else:
                cupy.fail_next(failing, broken)
                figures(device, cells, 1)
        assert caught.value is broken
    assert (free_cells(cells), cupy.pinned_bytes) == (32, BATCH_BYTES)
    assert figures(device, cells, 5).wait() == [5] * 4


def test_a_wait_that_failed_may_be_tried_again(fake) -> None:
    cupy = fake()
    device, broken = CudaDevice(cupy, 0), cupy.cuda.runtime.CUDARuntimeError(98)
    cells = Cells(device, 32)
    asked = figures(device, cells, 5)
    for _ in range(2):
        cupy.fail_next("synchronize", broken)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
            asked.wait()
        assert caught.value is broken
    assert free_cells(cells) == 31
    assert asked.wait() == [5] * 4
    assert free_cells(cells) == 32


@pytest.fixture(params=["shortage of pinned memory", "limit"])
def one_batch(fake, monkeypatch, request) -> Callable[[], tuple[CudaDevice, Cells]]:
    """Make a device where there are 32 cells and no more, for whatever reason."""

    def make() -> tuple[CudaDevice, Cells]:
        cupy = fake()
        device = CudaDevice(cupy, 0)
        cells = Cells(device, 32)
        if request.param == "limit":
            monkeypatch.setattr("stepwire_server.engines.cuda.sums._MOST_BATCHES", 1)
        if request.param == "shortage of pinned memory":
            for _ in range(100):
                cupy.fail_next("PinnedMemory", cupy.cuda.runtime.CUDARuntimeError(2))
        return device, cells

    return make


def test_who_finds_no_cell_reads_its_own_results(one_batch, together) -> None:
    device, cells = one_batch()
    unread, asked = UnreadFigures(100), []

    def ask() -> None:
        for value in range(80):
            asked.append(figures(device, cells, value, unread=unread))
            assert free_cells(cells) == 31 - value % 32

    together(ask)
    assert [each.wait() for each in asked] == [[value] * 4 for value in range(80)]
    assert free_cells(cells) == 32
    assert device.cupy.pinned_bytes == BATCH_BYTES


def test_who_finds_no_cell_and_has_none_waits_for_others(one_batch, together) -> None:
    device, cells = one_batch()
    unread, reached = UnreadFigures(100), threading.Event()
    theirs = [figures(device, cells, value, unread=unread) for value in range(32)]
    mine: list[list[int]] = []

    class Mine(UnreadFigures):
        def clear(self) -> None:
            super().clear()
            reached.set()

    def release() -> None:
        assert reached.wait(60.0)
        assert theirs[7].wait() == [7] * 4

    together(lambda: mine.append(figures(device, cells, 99, unread=Mine(1)).wait()), release)
    assert mine == [[99] * 4]
    unread.clear()
    assert [each.wait()[0] for each in theirs] == list(range(32))
    assert free_cells(cells) == 32


def test_an_error_of_ones_own_results_costs_no_cell(one_batch, together) -> None:
    device, cells = one_batch()
    unread, broken = UnreadFigures(100), device.cupy.cuda.runtime.CUDARuntimeError(98)
    theirs = [figures(device, cells, value, unread=unread) for value in range(32)]
    device.cupy.fail_next("synchronize", broken)
    with pytest.raises(device.cupy.cuda.runtime.CUDARuntimeError) as caught:
        together(lambda: figures(device, cells, 99, unread=unread))
    assert caught.value is broken
    assert [each.wait()[0] for each in theirs] == list(range(32))
    assert free_cells(cells) == 32


@every_order
def test_cells_are_shared_by_threads(fake, together, monkeypatch, order) -> None:
    """More threads than cells for what each leaves unread."""
    monkeypatch.setattr("stepwire_server.engines.cuda.sums._MOST_BATCHES", 1)
    device = CudaDevice(fake(order), 0)
    cells = Cells(device, 32)

    def work(seed: int) -> None:
        unread = UnreadFigures(15)
        asked = [figures(device, cells, seed + turn, unread=unread) for turn in range(30)]
        assert [each.wait()[0] for each in asked] == list(range(seed, seed + 30))
        unread.clear()

    together(*(lambda seed=seed: work(seed) for seed in (0, 50, 100, 150)))
    assert free_cells(cells) == 32


# --- results that are noted ---------------------------------------------------------------------------------------


@every_order
def test_at_most_so_many_are_left_unread_and_none_is_lost(fake, order) -> None:
    cupy = fake(order)
    device = CudaDevice(cupy, 0)
    cells, unread = Cells(device, 32), UnreadFigures(3)
    asked = []
    for value in range(50):
        asked.append(figures(device, cells, value, unread=unread))
        assert free_cells(cells) == 32 - min(value + 1, 3)
    assert [each.wait() for each in asked] == [[value] * 4 for value in range(50)]
    assert (free_cells(cells), cupy.pinned_bytes) == (32, BATCH_BYTES)
    unread.clear()
    assert free_cells(cells) == 32, "what was read is not given back again"


def test_what_nobody_waits_for_gives_its_cells_back_when_all_is_read(fake) -> None:
    device = CudaDevice(fake(), 0)
    cells, unread = Cells(device, 32), UnreadFigures(20)
    for value in range(10):
        figures(device, cells, value, unread=unread)
    assert free_cells(cells) == 22
    unread.clear()
    assert free_cells(cells) == 32
