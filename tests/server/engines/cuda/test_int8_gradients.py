"""Gradients in blocks of 8 bits on a pretended GPU: the bits of the decoded gradient, wherever a range begins."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.wire.int8_blocks import BLOCK, INT8, decode_blocks
from stepwire_server.engines import PARAM
from stepwire_server.engines.cuda.source import update_kernel
from stepwire_server.rules import Precision, Recipe
from tests.server.pretended_gpus import PretendedGpu, library_of, needs_compiler, pretended_cupy
from tests.support import cuda_cases as cases

pytestmark = needs_compiler

RECIPE = Recipe(cases.RULES[0], accumulates=True)
SIZE = 3001


@pytest.fixture(scope="module")
def engine(directory: pathlib.Path) -> Iterator[PretendedGpu]:
    """One engine for all cases, on a device that does nothing before it must."""
    kernels = [update_kernel(RECIPE, gradient, "float32") for gradient in ("int8", "float32")]
    cupy = pretended_cupy(directory, library=library_of(kernels, directory))
    yield PretendedGpu(cupy)
    cupy.check()


def pair_of(state: Any, blocks: np.ndarray, count: int) -> list[tuple[Any, Any]]:
    """Put a chunk as blocks, and as what they decode to; with each what keeps it."""
    buffers = [state.receive(), state.receive()]
    payloads = [blocks, cases.unaligned(decode_blocks(blocks, count))]
    return [(buffer, buffer.put(0, payload, count)) for buffer, payload in zip(buffers, payloads, strict=True)]


@pytest.mark.parametrize("start", range(4))
def test_ranges_may_begin_anywhere_in_a_block(engine: PretendedGpu, start: int) -> None:
    """Where vectors start at the same place in all arrays, and where they never do."""
    arrays, results = cases.make_arrays(RECIPE, SIZE, odd=False), []
    blocks = cases.payload_of(arrays["gradient"], "int8")
    for which in (0, 1):
        state, found = cases.filled(engine, RECIPE, arrays), []
        buffer, chunk = pair_of(state, blocks, SIZE)[which]
        for begin, count in itertools.product((0, 1, 2, 3, 254, 255, 256, 511), (1, 5, 260, 2001)):
            out = np.empty(count, np.float32)
            found.append(state.sum_of_squares(chunk, begin, begin + count, 0.3).wait())
            found.append(state.sum_of_squares(chunk, begin, begin + count, 0.3, start).wait())
            state.accumulate(start, chunk, begin, begin + count, 0.7)
            state.update(cases.step_of(RECIPE), start, chunk, begin, begin + count, out).wait()
            found += out.tolist() + state.fetch(chunk, begin, begin + count, 0.5).tolist()
        results.append((cases.everything_of(state, RECIPE, SIZE), tuple(found)))
        buffer.close()
        state.close()
    cases.assert_same_numbers(results[0][1], results[1][1])
    for name, want in results[1][0].items():
        cases.assert_same_bits(results[0][0][name], want, name)


def test_a_gradient_takes_the_bytes_of_its_blocks_and_each_lies_where_its_elements_do(engine: PretendedGpu) -> None:
    state = engine.allocate({PARAM: Precision.FLOAT32}, SIZE)
    values = np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)
    blocks = cases.payload_of(values, "int8")
    buffer = state.receive()
    counts = {1280: 1280, 0: 1280, 2560: 441}
    chunks = [buffer.put(low, blocks[low // BLOCK :][:5], count) for low, count in counts.items()]
    assert buffer._block is not None
    base = buffer._block.memory
    assert base.nbytes == 12 * INT8.itemsize
    assert [(chunk.address - base.data.ptr) / INT8.itemsize for chunk in chunks] == [5, 0, 10]
    assert [len(chunk) for chunk in chunks] == list(counts.values())
    want = decode_blocks(blocks, SIZE)
    for low, chunk in zip(counts, chunks, strict=True):
        cases.assert_same_bits(state.fetch(chunk, 0, len(chunk), 1.0), want[low : low + len(chunk)], f"from {low}")
    with pytest.raises(IndexError):
        buffer.put(2560, blocks[10:], 442)
    del base
    buffer.close()
    state.close()
