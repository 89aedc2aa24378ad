"""Properties of a step: how a gradient was cut, ordered, grouped or interrupted changes no bit of the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwire.optimizers import LAMB, LARS, SGD, Adam, AdamW, Lion, Optimizer, RMSprop
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.wire.messages import optimizer_to_wire
from stepwire_server.config import ServerConfig
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.rpc.decode_step import decode_step_request
from stepwire_server.sessions.session import Session
from tests.server.session_driver import RecordingWriter, everything, load, make_session, stage

pytestmark = pytest.mark.many

OPTIMIZERS: list[Optimizer] = [
    Adam(weight_decay=0.01),
    AdamW(formula="optax", nesterov=True),
    Adam(amsgrad=True, maximize=True),
    SGD(momentum=0.9, nesterov=True),
    RMSprop(centered=True),
    Lion(weight_decay=0.1),
]
LAYERWISE: list[Optimizer] = [LAMB(weight_decay=0.01), LARS(weight_decay=0.01)]
CLIPPED = optimizer_pb2.GradientTreatment(clip_grad_norm=0.5, clip_grad_value=0.004)
PRECISIONS = ["FLOAT32", "BFLOAT16_MOMENTS", "INT8_MOMENTS"]
STEPS = 3
MAX_BYTES = 1 << 20


def served(optimizer: Optimizer, precisions: Sequence[str]) -> list[str]:
    """Return the precisions that an optimizer's slots may be held in."""
    if getattr(optimizer, "centered", False):
        return [name for name in precisions if name == "FLOAT32"]
    return [name for name in precisions if name != "INT8_MOMENTS" or not getattr(optimizer, "amsgrad", False)]


def engines(optimizers: Sequence[Optimizer], precisions: Sequence[str]) -> pytest.MarkDecorator:
    """Try every optimizer in every precision on NumPy, and one in every precision on Numba, and a layerwise one.

    A kernel of Numba takes longer to compile than all steps of a test take, and rules differ in the body of its loop
    alone, where `test_parity` holds each to NumPy.
    """
    cases = [("numpy", each, precision) for each in optimizers for precision in served(each, precisions)]
    cases += [("numba", optimizers[0], precision) for precision in precisions]
    cases += [("numba", each, "FLOAT32") for each in optimizers if isinstance(each, LAMB)]
    named = [
        pytest.param(
            engine,
            optimizer,
            precision,
            marks=pytest.mark.slow if engine == "numba" else (),
            id=f"{engine}-{optimizer.rule}-{precision}",
        )
        for engine, optimizer, precision in cases
    ]
    return pytest.mark.parametrize(("engine", "optimizer", "precision"), named, indirect=["engine"])


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[CpuEngine]:
    made = CpuEngine(2, use_numba=request.param == "numba")
    yield made
    made.close()


def session(engine: CpuEngine, optimizer: Optimizer, counts: Sequence[int], groups: Sequence[int], **more) -> Session:
    config = session_pb2.SessionConfig(
        tensors=[
            tensor_pb2.TensorSpec(name=str(index), shape=[count], group=group)
            for index, (count, group) in enumerate(zip(counts, groups, strict=True))
        ],
        groups=[optimizer_pb2.ParameterGroup() for _ in range(max(groups) + 1)],
        optimizer=optimizer_to_wire(optimizer),
        initialization=session_pb2.INITIALIZATION_ZEROS,
        **more,
    )
    return make_session(decode_session_config(config, ServerConfig()), engine)


def place(made: Session, values: np.ndarray) -> np.ndarray:
    """Put the elements of all tensors, one after another, where they lie in the session's space."""
    space, done = np.zeros(made.config.layout.size, np.float32), 0
    for tensor in made.config.layout.tensors:
        space[tensor.offset : tensor.end] = values[done : done + tensor.count]
        done += tensor.count
    return space


def gather(made: Session, space: np.ndarray) -> np.ndarray:
    return np.concatenate([space[tensor.offset : tensor.end] for tensor in made.config.layout.tensors])


def apply_step(made: Session, gradient: np.ndarray, chunks: Sequence[tuple[int, int]], **begin):
    """Apply one step with chunks in the order given; return the parameters and the result."""
    number = made.ledger.applied_step + 1
    request = decode_step_request(step_pb2.StepBegin(step=number, **begin), made.config, MAX_BYTES)
    writer = RecordingWriter(made.config.layout.size, np.dtype(np.float32))
    with stage(made, request, place(made, gradient), chunks) as step:
        result = made.commit(step, writer)
    return gather(made, writer.values), result


def whole(made: Session) -> list[tuple[int, int]]:
    return [(0, made.config.layout.size)]


def slots_of(made: Session) -> dict[str, bytes]:
    return {slot: gather(made, values).tobytes() for slot, values in everything(made)[1].items()}


def gradients(seed: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((STEPS, size)) * 10.0 ** rng.uniform(-6, 0, (STEPS, size))).astype(np.float32)


def cut(cuts: Sequence[int], size: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(position % size for position in cuts)})
    return list(itertools.pairwise(edges))


@engines([*OPTIMIZERS, *LAYERWISE], PRECISIONS[:2])
def test_chunks_change_no_bit(engine: CpuEngine, optimizer: Optimizer, precision: str) -> None:
    more = {"gradient": CLIPPED, "state_precision": f"STATE_PRECISION_{precision}"}

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.integers(1, 10**6), max_size=12), st.randoms(use_true_random=False), st.integers(0, 99))
    def holds(cuts, random, seed) -> None:
        one, other = (session(engine, optimizer, [700, 1, 130], [0, 0, 1], **more) for _ in range(2))
        for gradient in gradients(seed, 831):
            ranges = cut(cuts, other.config.layout.size)
            random.shuffle(ranges)
            expected, result = apply_step(one, gradient, whole(one))
            got, result_of_ranges = apply_step(other, gradient, ranges, reply=step_pb2.ReplyOptions(chunk_bytes=4096))
            assert got.tobytes() == expected.tobytes()
            assert result_of_ranges.grad_norm == result.grad_norm
            assert result_of_ranges.clip_coefficient == result.clip_coefficient
            assert [group.grad_norm for group in result_of_ranges.groups] == [g.grad_norm for g in result.groups]
        assert slots_of(other) == slots_of(one)

    holds()


@engines(OPTIMIZERS, PRECISIONS[:2])
def test_tensors_and_groups_change_no_bit(engine: CpuEngine, optimizer: Optimizer, precision: str) -> None:
    more = {"gradient": CLIPPED, "state_precision": f"STATE_PRECISION_{precision}"}

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.integers(1, 899), min_size=1, max_size=6), st.data(), st.integers(0, 99))
    def holds(cuts, data, seed) -> None:
        counts = [high - low for low, high in cut(cuts, 900)]
        groups = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts))))
        one = session(engine, optimizer, [900], [0], **more)
        split = session(engine, optimizer, counts, groups, **more)
        for gradient in gradients(seed, 900):
            expected, result = apply_step(one, gradient, whole(one))
            got, split_result = apply_step(split, gradient, whole(split))
            assert got.tobytes() == expected.tobytes()
            assert split_result.grad_norm == result.grad_norm
            assert split_result.clip_coefficient == result.clip_coefficient
        assert slots_of(split) == slots_of(one)

    holds()


@engines(OPTIMIZERS, PRECISIONS[:2])
def test_sessions_change_no_bit(engine: CpuEngine, optimizer: Optimizer, precision: str) -> None:
    """No norm is clipped, since each session has its own."""
    limited = optimizer_pb2.GradientTreatment(clip_grad_value=0.004)
    more = {"gradient": limited, "state_precision": f"STATE_PRECISION_{precision}"}
    one, left, right = (session(engine, optimizer, [count], [0], **more) for count in (900, 333, 567))
    for gradient in gradients(5, 900):
        expected, _ = apply_step(one, gradient, whole(one))
        parts = [apply_step(left, gradient[:333], whole(left))[0], apply_step(right, gradient[333:], whole(right))[0]]
        assert np.concatenate(parts).tobytes() == expected.tobytes()


@engines([*OPTIMIZERS, *LAYERWISE], PRECISIONS)
def test_state_pulled_and_loaded_continues_as_if_nothing_had_happened(
    engine: CpuEngine, optimizer: Optimizer, precision: str
) -> None:
    treatment = optimizer_pb2.GradientTreatment(
        accumulation_steps=2,
        parameter_average_decay=0.9,
        clip_grad_norm=1.0,
        loss_scaling=optimizer_pb2.LossScaling(initial_scale=4.0, growth_interval=2),
    )
    more = {"gradient": treatment, "state_precision": f"STATE_PRECISION_{precision}"}
    counts, groups = [5000, 17, 300], [0, 0, 1]
    straight = session(engine, optimizer, counts, groups, **more)
    for gradient in gradients(7, 5317):
        apply_step(straight, gradient, whole(straight))
    resumed = session(engine, optimizer, counts, groups, **more)
    copy(straight, resumed)
    for gradient in gradients(8, 5317):
        expected, result = apply_step(straight, gradient, whole(straight))
        got, resumed_result = apply_step(resumed, gradient, whole(resumed))
        assert got.tobytes() == expected.tobytes()
        assert resumed_result == result
    assert slots_of(resumed) == slots_of(straight)


def copy(source: Session, target: Session) -> None:
    """Pull everything out of one session and load it into another, as a client would."""
    snapshot, slots = everything(source)
    assert load(target, slots, snapshot)
