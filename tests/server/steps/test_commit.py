"""What a commit does to the state: held against Adam and the treatment written out in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stepwire.errors import InvalidRequestError, NonFiniteGradientError
from stepwire.layout import TensorSpec
from stepwire.optimizers import LAMB, SGD, Adagrad, Adam
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import Outcome
from stepwire_server.steps.commit import Commit, initialize
from stepwire_server.steps.gradient import GradientStaging
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.tensor_steps import TensorSteps
from tests.server.configs import make_config

Vector = npt.NDArray[Any]
SPECS = (TensorSpec("a", (5,)), TensorSpec("b", (4,)), TensorSpec("c", (6,), 1))
SIZE = 262
INSIDE = np.r_[0:9, 256:262]
GROUPS = (slice(0, 9), slice(256, 262))


class Sink:
    """Takes an answer."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, Vector]] = []

    def buffer(self, offset: int, count: int) -> Vector:
        self.chunks.append((offset, np.full(count, 77, np.float32)))
        return self.chunks[-1][1]

    def flush(self) -> None:
        pass

    def values(self) -> Vector:
        assert [offset for offset, _ in self.chunks] == np.cumsum(
            [0, *(len(values) for _, values in self.chunks[:-1])]
        ).tolist()
        return np.concatenate([values for _, values in self.chunks])


class Bench:
    """State and progress of one session, and how to step it."""

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.state = CpuEngine(threads=1, use_numba=False).allocate(config.slots, config.layout.size, config.kept)
        self.progress = TensorSteps(config, [0] * len(config.layout.tensors))
        self.sink = Sink()
        initialize(config, self.state)
        self.start = np.zeros(SIZE, np.float32)
        self.start[INSIDE] = np.random.default_rng(9).standard_normal(len(INSIDE)).astype(np.float32)
        self.state.write("param", 0, self.start)

    def commit(
        self, step: int, gradient: Vector, cuts: Sequence[int] = (), unscale: float = 1.0, **fields: Any
    ) -> Outcome:
        request = StepRequest(step, 0, FLOAT32, FLOAT32, True, 100, self.config.groups)._replace(**fields)
        active = self.config.without(request.missing)
        room = MemoryBudget(10_000).reserve(1, "it")
        staging = GradientStaging(request, active, self.state, room, unscale=unscale, replay=False)
        edges = [0, *cuts, SIZE]
        for low, high in zip(edges, edges[1:], strict=False):
            staging.add(low, high - low, np.frombuffer(gradient[low:high].tobytes(), np.uint8))
        work = Commit(self.config, request, staging, self.state, self.progress)
        self.sink = Sink()
        outcome = work.apply(self.sink) if work.updates else work.keep(self.sink)
        if outcome.updated:
            self.progress.advance(active)
        return outcome

    def read(self, slot: str = "param") -> Vector:
        values = np.empty(SIZE, np.float32)
        self.state.read(slot, 0, values).wait()
        return values


def bench(**fields: Any) -> Bench:
    optimizer = fields.setdefault("optimizer", Adam(lr=0.125, betas=(0.5, 0.75), eps=0.0625))
    fields.setdefault("groups", (optimizer.hyperparameters(), optimizer.hyperparameters()))
    treatment = {name: fields.pop(name) for name in list(fields) if hasattr(GradientTreatment, name)}
    return Bench(make_config(*SPECS, treatment=GradientTreatment(**treatment), **fields))


def gradient(seed: int) -> Vector:
    values = np.zeros(SIZE, np.float32)
    values[INSIDE] = np.random.default_rng(seed).standard_normal(len(INSIDE)).astype(np.float32)
    return values


def adam(start: Vector, gradients: Sequence[Vector]) -> Vector:
    """Run `bench`'s Adam in float64, from the paper."""
    p = start.astype(np.float64)
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    for t, g in enumerate((value.astype(np.float64) for value in gradients), 1):
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        p = p - 0.125 * (m / (1 - 0.5**t)) / (np.sqrt(v / (1 - 0.75**t)) + 0.0625)
    return p


def norms_of(values: Vector) -> list[float]:
    return [float(np.linalg.norm(values[group].astype(np.float64))) for group in GROUPS]


def rounded(norms: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(np.float32(norm)) for norm in norms)


def test_a_step_updates_and_answers_and_measures() -> None:
    made = bench()
    for step in (1, 2):
        before = made.read()
        outcome = made.commit(step, gradient(step))
        after = made.read()
        assert (outcome.updated, outcome.skipped, outcome.non_finite_count) == (True, False, 0)
        assert outcome.norms.groups == rounded(norms_of(gradient(step)))
        assert outcome.clipped == outcome.norms.groups
        assert outcome.update_norms == pytest.approx(norms_of(after - before), rel=1e-5)
        assert outcome.param_norms == pytest.approx(norms_of(after), rel=1e-5)
        assert made.sink.values().tobytes() == after.tobytes()
    np.testing.assert_allclose(made.read(), adam(made.start, [gradient(1), gradient(2)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(3,), (9, 256), (5, 100, 258), tuple(range(1, SIZE))])
@pytest.mark.parametrize("bounds", [{}, {"clip_grad_norm": 0.5, "clip_grad_value": 0.125, "accumulation_steps": 2}])
def test_no_cut_changes_a_bit(cuts: Sequence[int], bounds: dict[str, Any]) -> None:
    whole, cut = bench(**bounds), bench(**bounds)
    for step in (1, 2, 3, 4):
        whole.commit(step, gradient(step))
        cut.commit(step, gradient(step), cuts)
        assert cut.sink.values().tobytes() == whole.sink.values().tobytes()
    assert all(cut.read(slot).tobytes() == whole.read(slot).tobytes() for slot in whole.config.slots)


def test_norm_clipping_scales_the_gradient_of_all_groups() -> None:
    made = bench(clip_grad_norm=0.5)
    outcome = made.commit(1, gradient(1))
    total = float(np.float32(math.hypot(*norms_of(gradient(1)))))
    factor = 0.5 / (total + 1e-6)
    assert outcome.norms.coefficient == factor < 1.0
    assert outcome.clipped == pytest.approx([norm * factor for norm in norms_of(gradient(1))], rel=1e-6)
    np.testing.assert_allclose(made.read(), adam(made.start, [gradient(1) * factor]), rtol=1e-5, atol=1e-6)


def test_a_groups_own_bound_leaves_the_other_group_alone() -> None:
    made = bench(group_clips=(None, 0.25))
    outcome = made.commit(1, gradient(1))
    factor = 0.25 / (rounded(norms_of(gradient(1)))[1] + 1e-6)
    assert outcome.norms.coefficients == (1.0, factor)
    clipped = gradient(1).astype(np.float64)
    clipped[GROUPS[1]] *= factor
    np.testing.assert_allclose(made.read(), adam(made.start, [clipped]), rtol=1e-5, atol=1e-6)


def test_elements_are_clipped_after_norms() -> None:
    made = bench(clip_grad_norm=1.0, clip_grad_value=0.25, measures=False)
    outcome = made.commit(1, gradient(1))
    limited = np.clip(gradient(1) * outcome.norms.coefficient, -0.25, 0.25)
    assert outcome.clipped == pytest.approx(norms_of(limited), rel=1e-5)
    assert (outcome.update_norms, outcome.param_norms) == ((), ())
    np.testing.assert_allclose(made.read(), adam(made.start, [limited]), rtol=1e-5, atol=1e-6)


def test_unscaling_comes_first() -> None:
    made, plain = bench(clip_grad_norm=0.5), bench(clip_grad_norm=0.5)
    scaled = made.commit(1, gradient(1) * np.float32(1024.0), unscale=1.0 / 1024.0)
    assert scaled == plain.commit(1, gradient(1))
    assert made.read().tobytes() == plain.read().tobytes()


def test_micro_steps_add_up_to_one_update() -> None:
    made = bench(accumulation_steps=3)
    for step in (1, 2):
        outcome = made.commit(step, gradient(step))
        assert (outcome.updated, outcome.skipped) == (False, False)
        assert outcome.norms.groups == outcome.clipped == rounded(norms_of(gradient(step)))
        assert outcome.record(step, 1, [0, 0], (0.0, 0.0, 0.0), None).accumulated
        assert made.sink.values().tobytes() == made.start.tobytes() == made.read().tobytes()
    together = (gradient(1) + gradient(2)) + gradient(3)
    outcome = made.commit(3, gradient(3))
    assert outcome.norms.groups == rounded(norms_of(together))
    np.testing.assert_allclose(made.read(), adam(made.start, [together]), rtol=1e-5, atol=1e-6)
    assert not made.read("grad_accumulation").any()
    assert made.progress.tensor_steps() == (1, 1, 1)


@pytest.mark.parametrize("policy", ["reject", "skip"])
@pytest.mark.parametrize("step", [2, 3])
def test_a_micro_step_that_is_not_finite_adds_nothing(policy: Any, step: int) -> None:
    made = bench(accumulation_steps=3, non_finite=policy)
    for earlier in range(1, step):
        made.commit(earlier, gradient(earlier))
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    bad = gradient(step)
    bad[258] = np.inf
    if policy == "reject":
        with pytest.raises(NonFiniteGradientError, match="'c' holds NaN or Inf"):
            made.commit(step, bad)
    else:
        outcome = made.commit(step, bad)
        assert (outcome.updated, outcome.skipped, outcome.non_finite_count) == (False, True, 1)
        assert outcome.clipped == (0.0, 0.0)
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before


def test_a_sum_beyond_float32_is_refused_though_every_part_is_finite() -> None:
    made = bench(accumulation_steps=2)
    large = gradient(1)
    large[3] = 3e38
    made.commit(1, large)
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    with pytest.raises(NonFiniteGradientError, match="the sum of the accumulated gradients is beyond float32"):
        made.commit(2, large)
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before


def test_tensors_without_a_gradient_stay_as_they_are_and_keep_their_t() -> None:
    made = bench(missing_gradient="keep")
    made.commit(1, gradient(1))
    before = {slot: made.read(slot) for slot in made.config.slots}
    outcome = made.commit(2, gradient(2), missing=frozenset({1}))
    after = {slot: made.read(slot) for slot in made.config.slots}
    for slot in made.config.slots:
        assert after[slot][5:9].tobytes() == before[slot][5:9].tobytes()
        assert (after[slot][:5] != before[slot][:5]).all()
    assert made.progress.tensor_steps() == (2, 1, 2)
    assert made.sink.values().tobytes() == after["param"].tobytes()
    moved = float(np.linalg.norm(gradient(2)[:5].astype(np.float64)))
    assert outcome.norms.groups[0] == float(np.float32(moved))
    assert outcome.param_norms[0] == pytest.approx(float(np.linalg.norm(after["param"][:5])), rel=1e-5)


def test_the_average_follows_the_parameters() -> None:
    made = bench(parameter_average_decay=0.75)
    made.state.copy("param", "param_average")
    assert made.read("param_average").tobytes() == made.start.tobytes()
    average = made.start.astype(np.float64)
    for step in (1, 2, 3):
        made.commit(step, gradient(step))
        average += 0.25 * (made.read().astype(np.float64) - average)
    np.testing.assert_allclose(made.read("param_average"), average, rtol=1e-5, atol=1e-6)


def test_a_layerwise_rule_steps_each_tensor_by_its_norm() -> None:
    made = bench(optimizer=LAMB(lr=0.5))
    made.commit(1, gradient(1))
    moved = (made.read() - made.start).astype(np.float64)
    for start, end in ((0, 5), (5, 9), (256, 262)):
        norm = float(np.linalg.norm(made.start[start:end].astype(np.float64)))
        assert float(np.linalg.norm(moved[start:end])) == pytest.approx(0.5 * norm, rel=1e-5)


def test_what_is_missing_is_told_before_anything_is_touched() -> None:
    made = bench()
    request = StepRequest(1, 0, FLOAT32, FLOAT32, True, 100, made.config.groups)
    room = MemoryBudget(100).reserve(1, "it")
    staging = GradientStaging(request, made.config.active, made.state, room, unscale=1.0, replay=False)
    with pytest.raises(InvalidRequestError, match=r"elements \[0, 9\) were not sent"):
        Commit(made.config, request, staging, made.state, made.progress)
    assert made.read().tobytes() == made.start.tobytes()


def test_what_is_allowed_to_be_infinite_is_applied() -> None:
    made = bench(optimizer=SGD(lr=0.5), non_finite="allow")
    bad = gradient(1)
    bad[2] = np.inf
    outcome = made.commit(1, bad)
    assert (outcome.updated, outcome.non_finite_count) == (True, 1)
    assert outcome.norms.groups[0] == math.inf
    assert made.read()[2] == -np.inf
    np.testing.assert_allclose(made.read()[3:9], (made.start - 0.5 * bad)[3:9], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_adagrads_sum_starts_where_it_is_told(value: float) -> None:
    """In tensors; padding stays zero."""
    made = bench(optimizer=Adagrad(initial_accumulator_value=value))
    expected = np.zeros(SIZE, np.float32)
    expected[INSIDE] = value
    assert made.read("sum").tobytes() == expected.tobytes()


def test_pieces_cover_a_range_once() -> None:
    assert split_range(3, 10, 3) == [(3, 6), (6, 9), (9, 10)]
    assert split_range(4, 10, 3) == [(4, 6), (6, 9), (9, 10)]
    assert split_range(4, 5, 3) == [(4, 5)]
    assert split_range(3, 3, 3) == []


def test_the_record_says_what_the_outcome_was() -> None:
    made = bench(clip_grad_norm=0.5)
    outcome = made.commit(1, gradient(1))
    record = outcome.record(1, 4, [1, 1], (0.5, 0.25, 0.125), 1024.0)
    assert (record.step, record.epoch, record.loss_scale, record.accumulated) == (1, 4, 1024.0, False)
    assert (record.receive_seconds, record.queue_seconds, record.apply_seconds) == (0.5, 0.25, 0.125)
    assert record.clip_coefficient == outcome.norms.coefficient
    assert record.clipped_grad_norm == outcome.norms.left * outcome.norms.coefficient
    assert record.update_norm == math.hypot(*outcome.update_norms)
    assert [group.param_norm for group in record.groups] == list(outcome.param_norms)
    assert [group.t for group in record.groups] == [1, 1]
