"""A pretended GPU takes gradients from shared memory and answers into it by itself, in the bits of the CPU."""

from __future__ import annotations

import contextlib
import gc
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.layout import TensorSpec
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines import CpuEngine
from stepwire_server.sharing import shared_step
from stepwire_server.sharing.host_buffers import HostBuffers
from stepwire_server.sharing.shared_step import MemoryReplyWriter, stage_shared
from tests.server.configs import make_config
from tests.server.pretended_gpus import PretendedGpu, kernels_of_config, library_of, machine_code, needs_compiler
from tests.server.session_driver import apply_step, begin, everything, load, make_session, request_of
from tests.support.fake_cupy.classes import CUDARuntimeError

pytestmark = needs_compiler

SIZE = 3000
PLANS = {
    dtype.name: make_config(TensorSpec("w", (SIZE,)), gradient_dtype=dtype, reply_dtype=dtype)
    for dtype in (FLOAT32, BFLOAT16)
}


@pytest.fixture(scope="module")
def library(directory: pathlib.Path) -> Any:
    return library_of([kernel for config in PLANS.values() for kernel in kernels_of_config(config)], directory)


@pytest.fixture(scope="module", autouse=True)
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    yield from machine_code(tmp_path_factory)


def gradient(step: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SIZE).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("order", ["lazy", "greedy", ("random", 3)], ids=str)
@pytest.mark.parametrize("config", PLANS.values(), ids=PLANS)
def test_steps_in_shared_memory_are_the_cpus(
    fake: Any, library: Any, monkeypatch: pytest.MonkeyPatch, config: Any, order: Any, pinned: bool
) -> None:
    monkeypatch.setattr(shared_step, "_CHUNK_ELEMENTS", 512)
    cupy = fake(order, library=library)
    with contextlib.closing(CpuEngine(threads=1, use_numba=False)) as cpu:
        sessions = [make_session(config, PretendedGpu(cupy)), make_session(config, cpu)]
        for session in sessions:
            load(session, {"param": gradient(99, FLOAT32)})
        if not pinned:
            cupy.fail_next("hostRegister", CUDARuntimeError(2))
        with contextlib.closing(HostBuffers(sessions[0])) as buffers:
            assert not buffers.in_place
            assert cupy.registered_bytes == buffers.parameter_bytes + (buffers.gradient_bytes if pinned else 0)
            for step in range(1, 6):
                buffers.gradient[:] = gradient(step, config.gradient_dtype)
                with begin(sessions[0], request_of(sessions[0], shared=True, reply_elements=512)) as staged:
                    stage_shared(buffers, staged, SIZE, sessions[0].depth)
                    result = sessions[0].commit(staged, MemoryReplyWriter(buffers.parameters))
                buffers.gradient[:] = 0  # nothing reads it any more
                expected, reply = apply_step(sessions[1], gradient(step, config.gradient_dtype))
                assert result.grad_norm == expected.grad_norm
                assert buffers.parameters.tobytes() == reply.tobytes()
        assert cupy.registered_bytes == 0
        pulled = [everything(session)[1] for session in sessions]
        assert all(pulled[0][slot].tobytes() == pulled[1][slot].tobytes() for slot in pulled[1])
        for session in sessions:
            session.close()
    del sessions, session, buffers, staged
    gc.collect()


def test_slots_cannot_lie_in_memory_of_the_host(fake: Any, library: Any) -> None:
    engine = PretendedGpu(fake(library=library))
    session = make_session(PLANS["float32"], engine)
    memory = np.full(SIZE, 7.0, np.float32)
    assert not session._state.arrays.move("param", memory)
    assert (memory == 7.0).all()
    session.close()
    del session, engine
    gc.collect()
