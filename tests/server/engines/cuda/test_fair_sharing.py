"""Sessions that share a pretended GPU: turns beside buffers of the bus and cells of sums, which are few as well."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.layout import TensorSpec
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.fair_share import FairShare
from stepwire_server.devices.pool import Device
from stepwire_server.engines import CpuEngine, Engine
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config
from tests.server.pretended_gpus import PretendedGpu, kernels_of_config, library_of, needs_compiler
from tests.server.session_driver import RecordingWriter, everything, request_of, stage

pytestmark = needs_compiler

SIZE, PASS, STEPS = 3072, 256, 2
CONFIGS = {
    "plain": make_config(TensorSpec("w", (SIZE,))),
    "accumulation": make_config(TensorSpec("w", (SIZE,)), treatment=GradientTreatment(accumulation_steps=2)),
}


@pytest.fixture(scope="module")
def library(directory: pathlib.Path) -> Any:
    return library_of((kernel for config in CONFIGS.values() for kernel in kernels_of_config(config)), directory)


def session_on(device: Device, name: str) -> Session:
    session = Session("ab" * 16, CONFIGS[name], device, epoch=1, clock=lambda: 0.0)
    session.acquire()
    return session


def steps(session: Session, seed: int) -> Callable[[], None]:
    """Return some steps whose replies have many chunks, staged in several."""

    def work() -> None:
        for step in range(STEPS):
            gradient = np.random.default_rng([seed, step]).standard_normal(SIZE, np.float32)
            request = request_of(session, reply_elements=PASS)
            chunks = [(low, low + 1024) for low in range(0, SIZE, 1024)]
            with stage(session, request, gradient, chunks) as staged:
                session.commit(staged, RecordingWriter(SIZE, request.reply_dtype))

    return work


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("order", ["eager", "lazy", ("random", 1)], ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_sessions_with_turns_wait_for_no_buffer_of_each_other(
    fake: Any, library: Any, together: Callable[..., None], name: str, order: Any, turns: int
) -> None:
    """Three sessions ask for more chunks than there are buffers, and each waits for turns with some of its own."""
    engine: Engine = PretendedGpu(fake(order, library=library))
    device = Device(engine, MemoryBudget(1 << 30), FairShare(turns=turns))
    beside = [session_on(device, name) for _ in range(3)]
    together(*(steps(session, seed) for seed, session in enumerate(beside)))
    assert device.share.statistics() == (0, 0)
    reference = CpuEngine(threads=1, use_numba=False)
    for seed, session in enumerate(beside):
        alone = session_on(Device(reference, MemoryBudget(1 << 30)), name)
        steps(alone, seed)()
        assert session.ledger.applied_step == STEPS
        for slot, values in everything(alone)[1].items():
            np.testing.assert_allclose(everything(session)[1][slot], values, rtol=1e-6, atol=1e-9)
        session.close()


def test_a_session_that_waits_for_a_turn_holds_no_buffer(fake: Any, library: Any, until: Any, together: Any) -> None:
    engine = PretendedGpu(fake("lazy", library=library))
    device = Device(engine, MemoryBudget(1 << 30), FairShare(turns=1))
    session, outside = session_on(device, "plain"), device.share.flow(0)
    free = len(engine._resources.bus._down)
    began = 0.0

    class Writer(RecordingWriter):
        """Has another session hold the turn from the third chunk on."""

        def buffer(self, offset: int, count: int) -> Any:
            nonlocal began
            if offset == 2 * PASS:
                assert len(engine._resources.bus._down) == free - 2, "the chunks before are on their way"
                began = outside.acquire(0, session._state.arrays)
            return super().buffer(offset, count)

    def work() -> None:
        gradient = np.ones(SIZE, np.float32)
        request = request_of(session, reply_elements=PASS)
        with stage(session, request, gradient, [(0, SIZE)]) as staged:
            session.commit(staged, Writer(SIZE, request.reply_dtype))

    def look() -> None:
        until(lambda: device.share.statistics().waiting == 1)
        assert len(engine._resources.bus._down) == free
        outside.release(began)

    together(work, look)
    session.close()
