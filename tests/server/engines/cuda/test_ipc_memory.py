"""Memory for another process: of whole blocks, zeroed at both ends of its life, and read and written where it lies."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines import PARAM
from stepwire_server.engines.cuda.ipc_memory import DeviceArray
from stepwire_server.rules import Precision
from tests.server.pretended_gpus import PretendedGpu, needs_compiler

BLOCK = 2 << 20
ORDERS = ["eager", "lazy", "greedy", ("random", 1), ("random", 2)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_it_is_zeroed_at_both_ends(fake, order) -> None:
    cupy = fake(order=order, memory_bytes=4 << 20)
    engine = PretendedGpu(cupy)
    before, exported = cupy.used_bytes, engine.export(BLOCK)
    assert cupy.used_bytes == before + BLOCK
    assert exported.read(0, BLOCK) == bytes(BLOCK)
    assert (len(exported.handle), exported.device_uuid) == (64, cupy.libcuda.uuids[0])
    exported.close()
    exported.close()
    assert cupy.used_bytes == before


@pytest.mark.parametrize("status", [1, 98, 801])
def test_a_device_without_ipc_says_what_to_do(fake, status) -> None:
    cupy = fake()
    engine = PretendedGpu(cupy)
    before = cupy.used_bytes
    cupy.libcuda.statuses["cuIpcGetMemHandle"] = status
    with pytest.raises(UnsupportedFeatureError, match="--ipc=host --pid=host"):
        engine.export(BLOCK)
    assert cupy.used_bytes == before


def test_a_driver_that_tells_no_uuid(fake) -> None:
    cupy = fake()
    engine = PretendedGpu(cupy)
    cupy.libcuda.statuses |= {"cuDeviceGetUuid_v2": 801, "cuDeviceGetUuid": 801}
    with pytest.raises(UnsupportedFeatureError, match=r"UUID of cuda:0: .*CUDA_ERROR_NOT_SUPPORTED \(801\)"):
        engine.export(BLOCK)
    cupy.libcuda.statuses.pop("cuDeviceGetUuid")
    engine.export(BLOCK).close()


def test_a_shortage_is_one_of_memory(fake) -> None:
    engine = PretendedGpu(fake(memory_bytes=3 << 20))
    with pytest.raises(ResourceExhaustedError):
        engine.export(2 * BLOCK)


@needs_compiler
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_parameters_are_read_into_it_and_gradients_taken_from_it(fake, order, dtype) -> None:
    engine, size = PretendedGpu(fake(order=order)), 1001
    exported, values = engine.export(BLOCK), np.random.default_rng(4).standard_normal(size).astype(np.float32)
    state = engine.allocate({PARAM: Precision.FLOAT32}, size)
    state.write(PARAM, 0, values)
    answer = exported.array(8192, dtype, size)
    state.read(PARAM, 3, answer[3:size]).wait()
    expected = values.astype(dtype)
    assert exported.read(8192 + 3 * dtype.itemsize, (size - 3) * dtype.itemsize) == expected[3:].tobytes()
    buffer, received = state.receive(), state.receive()
    chunks = [buffer.put(0, answer), received.put(0, expected)]
    sums = [state.sum_of_squares(chunk, 3, size, 0.5).wait() for chunk in chunks]
    assert sums[0] == sums[1]
    assert state.fetch(chunks[0], 3, size, 0.5).tobytes() == state.fetch(chunks[1], 3, size, 0.5).tobytes()
    for each in (buffer, received, state, exported):
        each.close()


def test_arrays_are_views(fake) -> None:
    exported = PretendedGpu(fake()).export(BLOCK)
    array = exported.array(256, FLOAT32, 100)
    assert isinstance(array, DeviceArray)
    assert (len(array), array.size, array.dtype, array.nbytes) == (100, 100, FLOAT32, 400)
    assert array[10:20].address - array.address == 40
    assert (len(array.view(np.uint8)), array.view(BFLOAT16).dtype, len(array[90:200])) == (400, BFLOAT16, 10)
    with pytest.raises(IndexError, match="exported memory"):
        exported.array(BLOCK - 4, FLOAT32, 2)
    exported.close()
