"""The state of a session takes memory of its device, and gives all of it back whatever fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire.layout import TensorSpec
from stepwire.optimizers import Adagrad
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling
from stepwire.wire.dtypes import FLOAT16, FLOAT32, INT8
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.pool import Device
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Precision
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.state import Residency, SessionState
from stepwire_server.steps.result import Effect
from tests.server.configs import make_config
from tests.server.sessions.watched_engine import Failure, WatchedEngine

SIZE = 10
CONFIG = make_config(TensorSpec("w", (SIZE,)))
STATE_BYTES = 3 * 4 * SIZE


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine()


@pytest.fixture
def device(engine: WatchedEngine) -> Device:
    return Device(engine, MemoryBudget(1000))


def request(**fields: Any) -> StepRequest:
    return StepRequest(1, 0, FLOAT32, FLOAT32, True, 1 << 20, CONFIG.groups)._replace(**fields)


# --- residency --------------------------------------------------------------------------------------------------


def test_a_residency_reserves_before_it_allocates_and_gives_back_once(device: Device, engine: WatchedEngine) -> None:
    reserved: list[int] = []
    engine.trouble = lambda name: reserved.append(device.budget.reserved_bytes)
    residency = Residency.allocate(device, CONFIG.slots, CONFIG, "it")
    assert (reserved, engine.calls) == ([STATE_BYTES], ["allocate"])
    assert residency.nbytes == device.budget.reserved_bytes == STATE_BYTES
    residency.close()
    residency.close()
    assert device.budget.reserved_bytes == 0


def test_a_residency_gives_its_memory_back_when_allocation_fails(device: Device, engine: WatchedEngine) -> None:
    engine.break_at("allocate")
    with pytest.raises(Failure):
        Residency.allocate(device, CONFIG.slots, CONFIG, "it")
    assert device.budget.reserved_bytes == 0


def test_a_residency_that_does_not_fit_allocates_nothing(device: Device, engine: WatchedEngine) -> None:
    with (
        device.budget.reserve(1000 - STATE_BYTES + 1, "others"),
        pytest.raises(ResourceExhaustedError, match="staging the load"),
    ):
        Residency.allocate(device, CONFIG.slots, CONFIG, "staging the load")
    assert (engine.calls, device.budget.reserved_bytes) == ([], 0)


def test_a_residency_gives_its_memory_back_when_its_arrays_cannot_be_closed(device: Device) -> None:
    residency = Residency.allocate(device, CONFIG.slots, CONFIG, "it")

    def broken() -> None:
        raise Failure

    residency.arrays.close = broken  # type: ignore[method-assign]
    with pytest.raises(Failure):
        residency.close()
    assert device.budget.reserved_bytes == 0


def test_small_tensors_of_eight_bit_moments_are_reserved_as_float32(device: Device, engine: WatchedEngine) -> None:
    config = make_config(TensorSpec("w", (SIZE,)), precision=Precision.INT8)
    residency = Residency.allocate(device, config.slots, config, "it")
    assert residency.nbytes == engine.state_bytes(make_config(TensorSpec("w", (SIZE,))).slots, config.layout.size)
    residency.close()
    loaded = Residency.allocate(device, dict.fromkeys(("param",), Precision.FLOAT32), config, "it")
    assert loaded.nbytes == engine.state_bytes({"param": Precision.FLOAT32}, config.layout.size)


# --- the whole state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["allocate", "prepare"])
def test_a_state_that_cannot_be_made_gives_its_memory_back(device: Device, engine: WatchedEngine, broken: str) -> None:
    engine.break_at(broken)
    with pytest.raises(Failure):
        SessionState(CONFIG, device)
    assert device.budget.reserved_bytes == 0


def test_a_state_whose_gradient_would_never_fit_is_refused_at_once(engine: WatchedEngine) -> None:
    device = Device(engine, MemoryBudget(STATE_BYTES + 4 * SIZE - 1))
    with pytest.raises(ResourceExhaustedError, match="the session's state with one gradient"):
        SessionState(CONFIG, device)
    assert (engine.calls, device.budget.reserved_bytes) == ([], 0)


@pytest.mark.parametrize("rows", [1 << 40, 1 << 62])
def test_the_numbers_of_rows_of_a_table_that_never_fits_are_not_allocated(engine: WatchedEngine, rows: int) -> None:
    device = Device(engine, MemoryBudget(1000))
    with pytest.raises(ResourceExhaustedError, match="the session's state with one gradient"):
        SessionState(make_config(TensorSpec("t", (rows, 1), table="row_counter")), device)
    assert (engine.calls, device.budget.reserved_bytes) == ([], 0)


@pytest.mark.parametrize("size", [SIZE, (1 << 20) + 3])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_adagrads_sum_starts_from_its_first_value(engine: WatchedEngine, value: float, size: int) -> None:
    """In tensors; padding stays zero."""
    optimizer = Adagrad(initial_accumulator_value=value)
    specs = TensorSpec("a", (size,)), TensorSpec("b", (6,), 1)
    config = make_config(*specs, optimizer=optimizer, groups=(optimizer.hyperparameters(),) * 2)
    state = SessionState(config, Device(engine, MemoryBudget(1 << 30)))
    expected, values = np.zeros(config.layout.size, np.float32), np.empty(config.layout.size, np.float32)
    for tensor in config.layout.tensors:
        expected[tensor.offset : tensor.end] = value
    state.read("sum", 0, values)
    assert values.tobytes() == expected.tobytes()
    state.close()


@pytest.mark.parametrize(
    ("gradient_dtype", "reply_dtype", "nbytes"),
    [(FLOAT32, FLOAT32, 40), (FLOAT16, FLOAT16, 20), (FLOAT16, FLOAT32, 40), (INT8, FLOAT16, 260)],
)
def test_a_gradient_is_reserved_as_itself_or_its_reply(
    device: Device, gradient_dtype: Any, reply_dtype: Any, nbytes: int
) -> None:
    state = SessionState(CONFIG, device)
    gradient = state.stage_gradient(request(gradient_dtype=gradient_dtype, reply_dtype=reply_dtype), 1.0)
    assert device.budget.reserved_bytes == STATE_BYTES + nbytes
    gradient.close()
    gradient.close()
    assert device.budget.reserved_bytes == STATE_BYTES


def test_a_reply_in_an_order_of_its_own_has_room_beside_the_gradient(device: Device) -> None:
    """A chunk stays until all of it is replied to, and the reply is on its way meanwhile."""
    state = SessionState(CONFIG, device)
    one = state.stage_gradient(request(), 1.0)
    room = device.budget.reserved_bytes - STATE_BYTES
    one.close()
    for fields, expected in (({}, 2 * room), ({"reply": False}, room)):
        gradient = state.stage_gradient(request(reply_first=(1,), **fields), 1.0)
        assert device.budget.reserved_bytes == STATE_BYTES + expected
        gradient.close()


def test_a_gradient_in_shared_memory_takes_no_room(device: Device) -> None:
    state = SessionState(CONFIG, device)
    state.stage_gradient(request(shared=True), 1.0)
    assert device.budget.reserved_bytes == STATE_BYTES


def test_a_gradient_that_cannot_be_received_gives_its_room_back(device: Device, engine: WatchedEngine) -> None:
    state = SessionState(CONFIG, device)
    engine.break_at("receive")
    with pytest.raises(Failure):
        state.stage_gradient(request(), 1.0)
    assert device.budget.reserved_bytes == STATE_BYTES


def test_a_gradient_without_room_says_when_to_try_again(device: Device) -> None:
    state = SessionState(CONFIG, device)
    with (
        device.budget.reserve(1000 - STATE_BYTES - 1, "others"),
        pytest.raises(ResourceExhaustedError, match="the step's gradient") as refused,
    ):
        state.stage_gradient(request(), 1.0)
    assert refused.value.retry_after_seconds == 0.1


def test_a_load_that_cannot_be_allocated_gives_its_room_back(device: Device, engine: WatchedEngine) -> None:
    state = SessionState(CONFIG, device)
    engine.break_at("allocate")
    with pytest.raises(Failure):
        state.stage_load(("param",))
    assert device.budget.reserved_bytes == STATE_BYTES


def test_kernels_are_compiled_when_the_numbers_of_a_step_change(device: Device, engine: WatchedEngine) -> None:
    state = SessionState(CONFIG, device)
    engine.calls.clear()
    state.prepare(CONFIG.groups, FLOAT32, FLOAT32)
    assert engine.calls == []
    state.prepare(CONFIG.groups, FLOAT32, None)
    state.prepare(CONFIG.groups, FLOAT32, None)
    assert engine.calls == ["prepare"]


# --- numbers ----------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_load_are_those_of_the_next_snapshot(device: Device) -> None:
    scaling = LossScaling(initial_scale=8.0, growth_interval=2)
    config = make_config(TensorSpec("w", (SIZE,)), treatment=GradientTreatment(loss_scaling=scaling))
    state = SessionState(config, device)
    assert state.snapshot(0, 0) == Snapshot(0, 0, (0,), LossScale(8.0))
    loaded = LoadRequest(1, ("param",), tensor_steps=(7,), loss_scale=LossScale(4.0, 1))
    staged = state.stage_load(("param",))
    staged.arrays.write("param", 0, np.full(SIZE, 2.0, np.float32))
    state.adopt(staged, loaded, first=True)
    staged.close()
    assert device.budget.reserved_bytes == STATE_BYTES
    assert state.snapshot(3, 1) == Snapshot(3, 1, (7,), LossScale(4.0, 1))
    state.adopt(state.stage_load(("exp_avg",)), LoadRequest(2, ("exp_avg",)), first=False)
    assert state.snapshot(3, 2) == Snapshot(3, 2, (7,), LossScale(4.0, 1)), "a load without numbers leaves them"
    values = np.empty(SIZE, np.float32)
    state.read("param", 0, values)
    assert values.tolist() == [2.0] * SIZE


@pytest.mark.parametrize(
    ("effect", "steps", "scale"),
    [
        (Effect.UPDATED, (1,), LossScale(8.0, 1)),
        (Effect.ACCUMULATED, (0,), LossScale(8.0)),
        (Effect.SKIPPED, (0,), LossScale(4.0)),
    ],
)
def test_an_update_counts_and_a_skipped_one_lowers_the_scale(
    device: Device, effect: Effect, steps: tuple[int, ...], scale: LossScale
) -> None:
    scaling = LossScaling(initial_scale=8.0, growth_interval=2)
    config = make_config(TensorSpec("w", (SIZE,)), treatment=GradientTreatment(loss_scaling=scaling))
    state = SessionState(config, device)
    assert state.unscale(request(loss_scale=2.0)) == 1 / 8.0
    gradient = state.stage_gradient(request(), 1.0)
    state.advance(gradient, effect, config.groups)
    assert state.snapshot(1, 0) == Snapshot(1, 0, steps, scale)


def test_without_loss_scaling_the_request_says_the_factor(device: Device) -> None:
    assert SessionState(CONFIG, device).unscale(request(loss_scale=4.0)) == 0.25


def test_many_tensors_count_with_their_names() -> None:
    tensors = [TensorSpec(f"{index:04d}" + "x" * 96, (1,)) for index in range(1000)]
    config = make_config(*tensors)
    device = Device(WatchedEngine(), MemoryBudget(10_000_000))
    described = 1000 * (512 + 100) - 65_536
    state = SessionState(config, device)
    assert device.budget.reserved_bytes == state.nbytes == 12 * config.layout.size + described > described
    state.close()
    state.close()
    assert device.budget.reserved_bytes == 0
    small = Device(WatchedEngine(), MemoryBudget(described))
    with pytest.raises(ResourceExhaustedError, match="needs"):
        SessionState(config, small)
    assert small.budget.reserved_bytes == 0


def test_few_tensors_are_free() -> None:
    assert make_config(*(TensorSpec(str(index), (1,)) for index in range(100))).description_bytes == 0
