"""The effect of a commit on the state: held against Adam and the treatment written out in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stepwire.errors import InvalidRequestError, NonFiniteGradientError
from stepwire.layout import TensorSpec
from stepwire.optimizers import LAMB, SGD, Adam
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.commit import Commit
from stepwire_server.steps.gradient import StagedGradient
from stepwire_server.steps.result import Effect, Moment
from stepwire_server.steps.step import Step
from stepwire_server.steps.tensor_steps import TensorSteps
from tests.server.configs import make_config
from tests.server.session_driver import RecordingWriter, bring

Vector = npt.NDArray[Any]
SPECS = (TensorSpec("a", (5,)), TensorSpec("b", (4,)), TensorSpec("c", (6,), 1))
SIZE = 262
INSIDE = np.r_[0:9, 256:262]
GROUPS = (slice(0, 9), slice(256, 262))
TIMES = StepTimes(0.5, 0.25, 0.125)


class Bench:
    """The state of one session, and the way to step it; a `SteppedState`.

    Attributes:
        effect: the effect of the last step.
        reply: the reply to the last step.
    """

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.arrays = CpuEngine(threads=1, use_numba=False).allocate(config.slots, config.layout.size)
        self.tensor_steps = TensorSteps(config, [0] * len(config.layout.tensors))
        self.loss_scale: LossScale | None = None
        self.sum_bound = 0.0
        self.changed: list[tuple[int, int]] = []
        self.effect = Effect.SKIPPED
        self.reply = np.empty(0, np.float32)
        self.start = np.zeros(SIZE, np.float32)
        self.start[INSIDE] = np.random.default_rng(9).standard_normal(len(INSIDE)).astype(np.float32)
        self.arrays.write("param", 0, self.start)

    def before_change(self, start: int, end: int) -> None:
        self.changed.append((start, end))

    def stage(self, request: StepRequest, unscale: float = 1.0) -> Step:
        room, selection = MemoryBudget(10_000).reserve(1, "it"), self.config.without(request.missing)
        gradient = StagedGradient(request.gradient_dtype, selection, self.arrays, room, unscale=unscale)
        return Step(request, Holder(0, 1, 1, None), gradient, replay=False, began=0.0)

    def commit(
        self,
        step: int,
        gradient: Vector,
        cuts: Sequence[int] = (),
        unscale: float = 1.0,
        decision: Decision | None = None,
        **fields: Any,
    ) -> StepResult:
        request = StepRequest(step, 0, FLOAT32, FLOAT32, True, 100, self.config.groups)._replace(**fields)
        writer = RecordingWriter(SIZE, FLOAT32)
        with self.stage(request, unscale) as staged:
            bring(staged, gradient, itertools.pairwise([0, *cuts, SIZE]))
            staged.decision = decision
            commit = Commit(staged, self)
            commit.apply(writer)
            if commit.effect is Effect.UPDATED:
                self.tensor_steps.advance(staged.gradient.selection, commit.groups)
        assert [start for start, _ in writer.chunks] == [0, *(end for _, end in writer.chunks[:-1])]
        self.effect, self.reply = commit.effect, writer.values
        return commit.result(Moment(step, 4, TIMES))

    def read(self, slot: str = "param") -> Vector:
        values = np.empty(SIZE, np.float32)
        self.arrays.read(slot, 0, values).wait()
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


def norms_told(result: StepResult) -> tuple[float, ...]:
    return tuple(group.grad_norm for group in result.groups)


def clipped_norms_told(result: StepResult) -> tuple[float, ...]:
    return tuple(group.clipped_grad_norm for group in result.groups)


def rounded(norms: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(np.float32(norm)) for norm in norms)


def test_a_step_updates_and_answers_and_measures() -> None:
    made = bench()
    for step in (1, 2):
        before = made.read()
        result = made.commit(step, gradient(step))
        after = made.read()
        assert (made.effect, result.skipped, result.non_finite_count) == (Effect.UPDATED, False, 0)
        assert norms_told(result) == rounded(norms_of(gradient(step)))
        assert clipped_norms_told(result) == norms_told(result)
        assert [group.update_norm for group in result.groups] == pytest.approx(norms_of(after - before), rel=1e-5)
        assert [group.param_norm for group in result.groups] == pytest.approx(norms_of(after), rel=1e-5)
        assert made.reply.tobytes() == after.tobytes()
    np.testing.assert_allclose(made.read(), adam(made.start, [gradient(1), gradient(2)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(3,), (9, 256), (5, 100, 258), tuple(range(1, SIZE))])
@pytest.mark.parametrize("bounds", [{}, {"clip_grad_norm": 0.5, "clip_grad_value": 0.125, "accumulation_steps": 2}])
def test_no_cut_changes_a_bit(cuts: Sequence[int], bounds: dict[str, Any]) -> None:
    whole, cut = bench(**bounds), bench(**bounds)
    for step in (1, 2, 3, 4):
        whole.commit(step, gradient(step))
        cut.commit(step, gradient(step), cuts)
        assert cut.reply.tobytes() == whole.reply.tobytes()
    assert all(cut.read(slot).tobytes() == whole.read(slot).tobytes() for slot in whole.config.slots)


def test_norm_clipping_scales_the_gradient_of_all_groups() -> None:
    made = bench(clip_grad_norm=0.5)
    result = made.commit(1, gradient(1))
    total = float(np.float32(math.hypot(*norms_of(gradient(1)))))
    factor = 0.5 / (total + 1e-6)
    assert result.clip_coefficient == factor < 1.0
    assert clipped_norms_told(result) == pytest.approx([norm * factor for norm in norms_of(gradient(1))], rel=1e-6)
    np.testing.assert_allclose(made.read(), adam(made.start, [gradient(1) * factor]), rtol=1e-5, atol=1e-6)


def test_a_groups_own_bound_leaves_the_other_group_alone() -> None:
    made = bench(group_clips=(None, 0.25))
    result = made.commit(1, gradient(1))
    factor = 0.25 / (rounded(norms_of(gradient(1)))[1] + 1e-6)
    assert [group.clip_coefficient for group in result.groups] == [1.0, factor]
    clipped = gradient(1).astype(np.float64)
    clipped[GROUPS[1]] *= factor
    np.testing.assert_allclose(made.read(), adam(made.start, [clipped]), rtol=1e-5, atol=1e-6)


def test_elements_are_clipped_after_norms() -> None:
    made = bench(clip_grad_norm=1.0, clip_grad_value=0.25, measures=False)
    result = made.commit(1, gradient(1))
    limited = np.clip(gradient(1) * result.clip_coefficient, -0.25, 0.25)
    assert clipped_norms_told(result) == pytest.approx(norms_of(limited), rel=1e-5)
    assert result.clipped_grad_norm == math.hypot(*clipped_norms_told(result))
    assert {(group.update_norm, group.param_norm) for group in result.groups} == {(None, None)}
    assert (result.update_norm, result.param_norm) == (None, None)
    np.testing.assert_allclose(made.read(), adam(made.start, [limited]), rtol=1e-5, atol=1e-6)


def test_unscaling_comes_first() -> None:
    made, plain = bench(clip_grad_norm=0.5), bench(clip_grad_norm=0.5)
    scaled = made.commit(1, gradient(1) * np.float32(1024.0), unscale=1.0 / 1024.0)
    assert scaled == plain.commit(1, gradient(1))
    assert made.read().tobytes() == plain.read().tobytes()


def test_micro_steps_add_up_to_one_update() -> None:
    made = bench(accumulation_steps=3)
    for step in (1, 2):
        result = made.commit(step, gradient(step))
        assert (made.effect, result.accumulated, result.skipped) == (Effect.ACCUMULATED, True, False)
        assert norms_told(result) == clipped_norms_told(result) == rounded(norms_of(gradient(step)))
        assert [group.t for group in result.groups] == [0, 0]
        assert made.reply.tobytes() == made.start.tobytes() == made.read().tobytes()
    together = (gradient(1) + gradient(2)) + gradient(3)
    result = made.commit(3, gradient(3))
    assert (made.effect, result.accumulated) == (Effect.UPDATED, False)
    assert norms_told(result) == rounded(norms_of(together))
    np.testing.assert_allclose(made.read(), adam(made.start, [together]), rtol=1e-5, atol=1e-6)
    assert not made.read("grad_accumulation").any()
    assert made.tensor_steps.tensor_steps() == (1, 1, 1)


def with_inf(step: int) -> Vector:
    bad = gradient(step)
    bad[258] = np.inf
    return bad


@pytest.mark.parametrize("step", [2, 3])
def test_a_micro_step_that_is_not_finite_is_refused_and_adds_nothing(step: int) -> None:
    made = bench(accumulation_steps=3)
    for earlier in range(1, step):
        made.commit(earlier, gradient(earlier))
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    with pytest.raises(NonFiniteGradientError, match="'c' holds NaN or Inf"):
        made.commit(step, with_inf(step))
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before


@pytest.mark.parametrize("bad", [(1,), (2,), (3,), (1, 2, 3)], ids=str)
def test_an_accumulation_with_a_micro_step_that_is_not_finite_is_dropped_at_its_end(bad: tuple[int, ...]) -> None:
    made = bench(accumulation_steps=3, non_finite="skip")
    for step in (1, 2):
        result = made.commit(step, with_inf(step) if step in bad else gradient(step))
        assert (made.effect, result.accumulated, result.skipped) == (Effect.ACCUMULATED, True, False)
        assert result.non_finite_count == (step in bad)
    result = made.commit(3, with_inf(3) if 3 in bad else gradient(3))
    assert (made.effect, result.accumulated, result.skipped) == (Effect.SKIPPED, False, True)
    assert (result.non_finite_count, result.grad_norm) == (1, math.inf), "the sum's, whichever step made it so"
    assert clipped_norms_told(result) == (0.0, 0.0)
    assert made.reply.tobytes() == made.start.tobytes() == made.read().tobytes()
    assert not any(made.read(slot).any() for slot in made.config.slots if slot != "param")
    assert made.tensor_steps.tensor_steps() == (0, 0, 0)


def test_an_accumulation_that_may_be_infinite_is_applied_with_the_norm_of_its_sum() -> None:
    made = bench(optimizer=SGD(lr=0.5), accumulation_steps=2, non_finite="allow", clip_grad_norm=1e9)
    assert made.commit(1, gradient(1)).non_finite_count == 0
    result = made.commit(2, with_inf(2))
    assert (made.effect, result.skipped, result.non_finite_count) == (Effect.UPDATED, False, 1)
    assert norms_told(result) == (*rounded(norms_of(gradient(1) + gradient(2)))[:1], math.inf)
    assert not made.read("grad_accumulation").any()


LARGE = np.where(np.arange(SIZE) == 3, np.float32(3e38), gradient(1)).astype(np.float32)
BEYOND = "the sum of the accumulated gradients of tensor 'a' is beyond float32 "


@pytest.mark.parametrize("every", [2, 3])
def test_a_micro_step_whose_sum_is_beyond_float32_is_refused(every: int) -> None:
    """At once, and not only where the accumulation ends: nothing could be sent any more then."""
    made = bench(accumulation_steps=every)
    made.sum_bound = math.inf  # as after a load
    made.commit(1, LARGE)
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    with pytest.raises(NonFiniteGradientError, match=BEYOND) as refused:
        made.commit(2, LARGE)
    assert refused.value.metadata == {"tensor": "a", "element": "3", "non_finite_count": "1"}
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before
    made.commit(2, -LARGE)
    assert abs(made.read("grad_accumulation")[3]) == 0.0


def test_a_sum_beyond_float32_is_dropped_under_the_policy_skip() -> None:
    made = bench(accumulation_steps=3, non_finite="skip")
    assert [made.commit(step, LARGE).non_finite_count for step in (1, 2)] == [0, 0]
    result = made.commit(3, -LARGE)
    assert (made.effect, result.skipped, result.non_finite_count) == (Effect.SKIPPED, True, 1)
    assert made.read().tobytes() == made.start.tobytes()
    assert not made.read("grad_accumulation").any()


def test_tensors_without_a_gradient_stay_as_they_are_and_keep_their_t() -> None:
    made = bench(missing_gradient="keep")
    made.commit(1, gradient(1))
    before = {slot: made.read(slot) for slot in made.config.slots}
    result = made.commit(2, gradient(2), missing=frozenset({1}))
    after = {slot: made.read(slot) for slot in made.config.slots}
    for slot in made.config.slots:
        assert after[slot][5:9].tobytes() == before[slot][5:9].tobytes()
        assert (after[slot][:5] != before[slot][:5]).all()
    assert made.tensor_steps.tensor_steps() == (2, 1, 2)
    assert made.reply.tobytes() == after["param"].tobytes()
    moved = float(np.linalg.norm(gradient(2)[:5].astype(np.float64)))
    assert result.groups[0].grad_norm == float(np.float32(moved))
    assert result.groups[0].param_norm == pytest.approx(float(np.linalg.norm(after["param"][:5])), rel=1e-5)


def test_the_average_follows_the_parameters() -> None:
    made = bench(parameter_average_decay=0.75)
    made.arrays.copy("param", "param_average")
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
    with (
        made.stage(request) as staged,
        pytest.raises(InvalidRequestError, match=r"elements \[0, 9\) were not sent"),
    ):
        Commit(staged, made)
    assert made.read().tobytes() == made.start.tobytes()


def test_what_is_allowed_to_be_infinite_is_applied() -> None:
    made = bench(optimizer=SGD(lr=0.5), non_finite="allow")
    bad = gradient(1)
    bad[2] = np.inf
    result = made.commit(1, bad)
    assert (made.effect, result.non_finite_count) == (Effect.UPDATED, 1)
    assert result.groups[0].grad_norm == math.inf
    assert made.read()[2] == -np.inf
    np.testing.assert_allclose(made.read()[3:9], (made.start - 0.5 * bad)[3:9], rtol=1e-6)


def test_the_result_is_of_its_moment_and_sums_its_groups_up() -> None:
    made = bench(clip_grad_norm=0.5)
    made.loss_scale = LossScale(1024.0)
    result = made.commit(1, gradient(1))
    assert (result.step, result.epoch, result.loss_scale, result.accumulated) == (1, 4, 1024.0, False)
    assert result.times == TIMES
    total = float(np.float32(math.hypot(*norms_of(gradient(1)))))
    assert (result.grad_norm, result.clip_coefficient) == (total, 0.5 / (total + 1e-6))
    assert result.clipped_grad_norm == result.grad_norm * result.clip_coefficient
    assert {group.clip_coefficient for group in result.groups} == {result.clip_coefficient}
    assert result.update_norm == math.hypot(*(group.update_norm for group in result.groups))
    assert result.param_norm == math.hypot(*(group.param_norm for group in result.groups))
    assert [group.t for group in result.groups] == [1, 1]
    assert [group.hyperparameters for group in result.groups] == list(made.config.groups)


# --- decisions of a coordinator ---------------------------------------------------------------------------------


def test_the_factors_of_a_coordinator_come_before_the_sessions_own() -> None:
    made = bench(clip_grad_norm=0.5, group_clips=(None, 0.25))
    result = made.commit(1, gradient(1), decision=Decision(0.5, (1.0, 0.25)))
    clipped = gradient(1).astype(np.float64) * 0.5
    clipped[GROUPS[1]] *= 0.25
    assert [group.clip_coefficient for group in result.groups] == [0.5, 0.125]
    assert clipped_norms_told(result) == pytest.approx(norms_of(clipped), rel=1e-6)
    np.testing.assert_allclose(made.read(), adam(made.start, [clipped]), rtol=1e-5, atol=1e-6)


def test_a_step_that_a_coordinator_skips_uses_up_its_number_alone() -> None:
    made = bench(clip_grad_norm=0.5)
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    result = made.commit(1, gradient(1), decision=Decision(skip=True))
    assert (made.effect, result.skipped, result.non_finite_count) == (Effect.SKIPPED, True, 0)
    assert (result.clip_coefficient, result.clipped_grad_norm) == (1.0, 0.0)
    assert made.reply.tobytes() == before["param"]
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before


def test_a_decision_to_apply_is_not_turned_into_a_skip_by_one_shard() -> None:
    """The other shards apply: a gradient that is not finite is not the one that was decided about."""
    made = bench(non_finite="skip")
    before = {slot: made.read(slot).tobytes() for slot in made.config.slots}
    bad = gradient(1)
    bad[3] = np.nan
    with pytest.raises(NonFiniteGradientError, match="step 1: the decision is to apply, and this gradient holds NaN"):
        made.commit(1, bad, decision=Decision(1.0))
    assert {slot: made.read(slot).tobytes() for slot in made.config.slots} == before
    assert made.commit(1, gradient(1), decision=Decision(1.0)).skipped is False
