"""Grids are whole waves of the blocks that a device runs at a time, and modules are unloaded in their context."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest

from stepwire_server.engines.cuda.compiler import Compiler
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.kernels import CudaKernel, CudaKernels, head_of
from stepwire_server.engines.cuda.source import block_kernels
from stepwire_server.rules import Precision, Recipe
from tests.support import cuda_cases as cases

PLAIN = Recipe(cases.RULES[0])
EIGHT_BITS = Recipe(cases.RULES[0], precision=Precision.INT8)
HUGE = 1 << 40


@pytest.fixture
def with_resident(fake: Any) -> Any:
    """Make a kernel of which a multiprocessor holds some blocks at a time, on a device of 132 multiprocessors."""

    def make(blocks: int) -> CudaKernel:
        cupy = fake(processors=132)
        cupy._driver.resident_blocks = blocks
        return CudaKernel(types.SimpleNamespace(ptr=1), CudaDevice(cupy, 0))

    return make


@pytest.mark.parametrize("resident", [1, 3, 4, 5, 8])
def test_a_grid_is_a_multiple_of_the_blocks_that_run_at_a_time(with_resident, resident) -> None:
    kernel = with_resident(resident)
    assert kernel.wave == 132 * resident
    assert kernel.blocks_of(PLAIN, HUGE) == 16 * kernel.wave
    assert kernel.blocks_of(EIGHT_BITS, HUGE) == kernel.blocks_of_eight_bits(HUGE) == kernel.wave


@pytest.mark.parametrize(("resident", "expected"), [(1, 1980), (3, 1980), (4, 1584), (5, 1980), (8, 1056), (16, 2048)])
def test_a_grid_that_leaves_sums_has_no_tail_and_sums_that_a_cell_holds(with_resident, resident, expected) -> None:
    kernel, measuring = with_resident(resident), Recipe(cases.RULES[0], measures=True)
    assert kernel.blocks_of(measuring, HUGE) == expected


@pytest.mark.parametrize(("size", "plain", "eight_bits"), [(0, 1, 1), (1, 1, 1), (1025, 2, 1), (10_240, 10, 5)])
def test_a_small_range_has_as_many_blocks_as_have_work(with_resident, size, plain, eight_bits) -> None:
    kernel = with_resident(4)
    assert (kernel.blocks(size), kernel.blocks_of_eight_bits(size)) == (plain, eight_bits)


def test_a_kernel_that_fits_nowhere_has_a_block_all_the_same(with_resident) -> None:
    assert with_resident(0).wave == 132


def test_the_last_reference_to_a_kernel_may_go_in_any_thread(fake, tmp_path) -> None:
    """A session that nobody closed may be collected anywhere, and its kernels with it."""
    cupy = fake(library=types.SimpleNamespace(names=[kernel.name for kernel in block_kernels()]))
    kernels = CudaKernels(device := CudaDevice(cupy, 0), Compiler(device, tmp_path))
    held = [kernels.of_blocks("encode_signed_blocks")]
    kernels.close()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert not cupy.faults


@pytest.mark.parametrize(
    ("addresses", "itemsizes", "expected"),
    [
        ((64, 128), (4, 4), 0),
        ((68, 66), (4, 2), 3),
        ((72, 68, 34), (4, 2, 1), 2),
        ((64, 66), (4, 2), 100),
        ((76, 6), (4, 2), 1),
    ],
)
def test_the_head_goes_up_to_the_first_place_that_is_aligned_in_all_arrays(addresses, itemsizes, expected) -> None:
    assert head_of(addresses, itemsizes, 100) == expected
    aligned = {(a // i + expected) % 4 for a, i in zip(addresses, itemsizes, strict=True)}
    assert expected == 100 or aligned == {0}
    assert head_of(addresses, itemsizes, 0) == 0
