"""State in and out as it should be. What is wrong with a load or a pull: `test_bad_loads.py`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

DTYPES = {0: np.float32, 1: np.float32, 2: ml_dtypes.bfloat16, 3: np.float16}
COMMIT = pb.LoadRequest(commit=True)


def eighths(size: int, seed: int) -> Any:
    """Draw values that every encoding holds exactly."""
    return np.abs(np.random.default_rng(seed).integers(-16, 17, size) / 8.0).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [0, 4096])
def test_a_pull_is_a_header_and_then_each_slot_in_order(
    wire: Any, make_config: Any, make_live: Any, dtype: int, chunk_bytes: int
) -> None:
    live = make_live(wire, wire.create(make_config((5_000,))))
    live.step(1)
    request = pb.PullRequest(
        session_id=live.id,
        slots=["exp_avg_sq", "param"],
        dtype=dtype,  # type: ignore[arg-type]
        chunk_bytes=chunk_bytes,
    )
    first, *chunks = map(pb.PullResponse.FromString, wire.stream("Pull", [request]))
    assert [field.name for field, _ in first.ListFields()] == ["header"]
    assert (first.header.step, first.header.load, first.header.epoch) == (1, 0, 1)
    assert list(first.header.tensor_steps) == [1]
    most = (chunk_bytes or 65536) // np.dtype(DTYPES[dtype]).itemsize
    ranges = [(slot, offset) for slot in ("exp_avg_sq", "param") for offset in range(0, 5_000, most)]
    assert [(chunk.slot, chunk.chunk.offset) for chunk in chunks] == ranges
    _, masters = wire.pull(live.id, "param", "exp_avg_sq")
    for slot in ("param", "exp_avg_sq"):
        pulled = b"".join(chunk.payload for chunk in chunks if chunk.slot == slot)
        assert pulled == np.frombuffer(masters[slot], np.float32).astype(DTYPES[dtype]).tobytes()
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))


def test_where_loss_scaling_stands_is_pulled_and_loaded(wire: Any, make_config: Any, make_live: Any) -> None:
    treatment = optimizer_pb2.GradientTreatment(
        loss_scaling=optimizer_pb2.LossScaling(initial_scale=4.0, growth_interval=3)
    )
    live = make_live(wire, wire.create(make_config((3,), gradient=treatment)))
    assert live.step(1).telemetry.loss_scale == 4.0
    header, _ = wire.pull(live.id, "param")
    assert header.loss_scale == optimizer_pb2.LossScaleState(scale=4.0, clean_steps=1)
    live.load(live.load_opening(1), live.load_chunk(commit=True))
    assert wire.pull(live.id, "param")[0].loss_scale == header.loss_scale, "a load that does not say leaves it"
    state = optimizer_pb2.LossScaleState(scale=16.0, clean_steps=2)
    live.load(live.load_opening(2, loss_scale=state), live.load_chunk(commit=True))
    assert (wire.get(live.id).loss_scale, wire.pull(live.id, "param")[0].loss_scale) == (16.0, state)
    assert live.step(2).telemetry.loss_scale == 32.0
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))


def test_eight_bit_state_moves_to_another_session_bit_for_bit(wire: Any, make_config: Any, make_live: Any) -> None:
    """Their blocks' maxima travel with the moments."""
    config = make_config((5000,), (7,), state_precision=session_pb2.STATE_PRECISION_INT8_MOMENTS)
    first, second = (make_live(wire, wire.create(config)) for _ in range(2))
    first.step(1)
    slots = list(wire.get(first.id).layout.slots)
    assert slots == ["param", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"]
    header, values = wire.pull(first.id, *slots)
    opening = second.load_opening(1, *slots, step=1, tensor_steps=header.tensor_steps)
    chunks = [second.load_chunk(slot, values=np.frombuffer(values[slot], np.float32)) for slot in slots]
    second.load(opening, *chunks, COMMIT)
    assert wire.pull(second.id, *slots)[1] == values
    for live in (first, second):
        live.step(2)
    assert wire.pull(second.id, *slots)[1] == wire.pull(first.id, *slots)[1]
    for live in (first, second):
        wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))


def test_a_pull_without_slots_is_of_the_parameters(live: Any) -> None:
    _, by_name = live.wire.pull(live.id, "param")
    _, by_default = live.wire.pull(live.id)
    assert by_default == by_name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(0, 263), (0, 1, 2, 263), (100, 263, 0, 100)])
def test_a_load_is_pulled_as_it_was_sent(live: Any, dtype: int, cuts: tuple[int, ...]) -> None:
    """In any encoding, cut and ordered in any way, several slots mixed."""
    wanted = {slot: eighths(live.size, seed) for seed, slot in enumerate(("exp_avg", "param"))}
    ranges = [(start, end) for start, end in zip(cuts, cuts[1:], strict=False) if start < end]
    chunks = [
        live.load_chunk(slot, start, values[start:end].astype(DTYPES[dtype]))
        for start, end in ranges
        for slot, values in wanted.items()
    ]
    before = live.wire.pull(live.id, "exp_avg_sq")[1]
    answer = live.load(live.load_opening(2, *wanted, dtype=dtype, step=5, tensor_steps=[3, 4, 5]), *chunks, COMMIT)
    assert (answer.replayed, answer.session.applied_load, answer.session.applied_step) == (False, 2, 5)
    header, values = live.wire.pull(live.id, "param", "exp_avg", "exp_avg_sq")
    assert (header.step, header.load, list(header.tensor_steps)) == (5, 2, [3, 4, 5])
    for slot, value in wanted.items():
        value[17:256] = 0.0
        assert values[slot] == value.tobytes()
    assert values["exp_avg_sq"] == before["exp_avg_sq"]


def test_a_loads_answer_leaves_out_what_is_long(live: Any) -> None:
    answer = live.load(live.load_opening(2), live.load_chunk(commit=True))
    assert (len(answer.session.config.tensors), answer.session.HasField("layout")) == (0, False)
    assert (answer.session.session_id, answer.session.ready) == (live.id, True)


def test_a_load_without_counters_leaves_them(live: Any) -> None:
    live.load(live.load_opening(2), live.load_chunk(commit=True))
    header, _ = live.wire.pull(live.id, "param")
    assert (header.step, list(header.tensor_steps)) == (1, [1, 1, 1])
    assert live.step(2).telemetry.groups[0].t == 2


def test_a_load_of_a_whole_state_continues_bit_for_bit(live: Any, make_live: Any) -> None:
    live.step(2)
    header, values = live.wire.pull(live.id, "param", "exp_avg", "exp_avg_sq")
    copy = make_live(live.wire, live.wire.create(live.wire.get(live.id).config))
    chunks = [copy.load_chunk(slot, 0, np.frombuffer(value, np.float32)) for slot, value in values.items()]
    copy.load(copy.load_opening(1, *values, step=header.step, tensor_steps=header.tensor_steps), *chunks, COMMIT)
    for step in (3, 4):
        mine, other = live.frame(begin=step, commit=True), copy.frame(begin=step, commit=True)
        assert live.attach(mine)[0].payload == copy.attach(other)[0].payload
    assert copy.wire.pull(copy.id, *values)[1] == live.wire.pull(live.id, *values)[1]


def test_a_load_of_an_empty_session_has_no_chunks(wire: Any, make_config: Any, make_live: Any) -> None:
    live = make_live(wire, wire.create(make_config((0,), initialization=1)))
    answer = live.load(live.load_opening(1, "param", "exp_avg"), COMMIT)
    assert (answer.session.ready, answer.session.applied_load) == (True, 1)
    header, values = wire.pull(live.id, "param")
    assert (header.load, values) == (1, {"param": b""})


def test_the_scalars_of_tensors_are_pulled_and_loaded(wire: Any, make_config: Any, make_live: Any) -> None:
    numbers = optimizer_pb2.Hyperparameters(momentum=0.5, dampening=0.25)
    optimizer = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_SGD, hyperparameters=numbers)
    live = make_live(wire, wire.create(make_config((3,), (2,), optimizer=optimizer)))
    scalars = [list(wire.pull(live.id, "param")[0].tensor_scalars)]
    live.step(1)
    scalars.append(list(wire.pull(live.id, "param")[0].tensor_scalars))
    for load, fields in enumerate(({"tensor_scalars": [0.0, 1.0]}, {"tensor_steps": [0, 7]}, {}), start=1):
        live.load(live.load_opening(load, **fields), live.load_chunk(commit=True))
        scalars.append(list(wire.pull(live.id, "param")[0].tensor_scalars))
    assert scalars == [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
