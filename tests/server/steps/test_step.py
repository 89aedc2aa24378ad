"""One step from its first message to its commit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.step_request import StepRequest
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.gradient import StagedGradient
from stepwire_server.steps.step import Step
from tests.server.configs import make_config
from tests.server.session_driver import bring

SIZE = 10
CONFIG = make_config(TensorSpec("w", (SIZE,)))
HOLDER = Holder(0, 3, 2, None)


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(1000)


@pytest.fixture
def make(budget: MemoryBudget) -> Any:
    def create(*, replay: bool = False) -> Step:
        arrays = CpuEngine(threads=1, use_numba=False).allocate(CONFIG.slots, SIZE)
        gradient = StagedGradient(FLOAT32, CONFIG.active, arrays, budget.reserve(100, "it"), unscale=1.0)
        request = StepRequest(1, 0, FLOAT32, FLOAT32, True, 1 << 20, CONFIG.groups)
        return Step(request, HOLDER, gradient, replay=replay, began=5.0)

    return create


def test_a_step_starts_without_a_decision_and_is_received_when_it_begins(make: Any) -> None:
    step = make()
    assert step.holder is HOLDER
    assert (step.decision, step.began, step.received) == (None, 5.0, 5.0)


def test_chunks_are_added_to_the_gradient(make: Any) -> None:
    step = make()
    bring(step, np.ones(SIZE, np.float32), [(5, SIZE), (0, 5)])
    with pytest.raises(InvalidRequestError, match="overlaps"):
        step.add(0, 1, np.zeros(4, np.uint8))
    step.gradient.complete()
    assert step.gradient.squared_norms() == [10.0]


def test_the_chunks_of_a_replay_are_dropped_unread(make: Any) -> None:
    step = make(replay=True)
    step.add(2**63, 5, np.zeros(3, np.uint8))
    assert list(step.gradient.drain([(0, SIZE)])) == [(0, SIZE, None)]


def test_closing_twice_gives_the_memory_back_once(make: Any, budget: MemoryBudget) -> None:
    with make() as step:
        bring(step, np.ones(SIZE, np.float32), [(0, SIZE)])
        assert budget.reserved_bytes == 100
        step.close()
        assert budget.reserved_bytes == 0
    assert budget.reserved_bytes == 0
    assert step.gradient.pop() is None


def test_a_step_that_breaks_off_leaves_nothing(make: Any, budget: MemoryBudget) -> None:
    with pytest.raises(ZeroDivisionError), make() as step:
        bring(step, np.ones(SIZE, np.float32), [(0, 5)])
        raise ZeroDivisionError
    assert budget.reserved_bytes == 0
