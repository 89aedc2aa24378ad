"""Doubts: fingerprints that tell gradients apart, options that count, and what becomes of error feedback."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.errors import Reason, SessionNotReadyError, StepMismatchError
from stepwire.steps.call import StepCall
from stepwire.steps.doubt import Doubt, UntoldSteps, fingerprint_of_arrays, unfinished
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.v1 import optimizer_pb2, step_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32

GRADIENT = np.float32([1.0, -2.0, 3.5, 0.0, 7.0])


def call(*gradients: Any, **fields: Any) -> StepCall:
    begin = step_pb2.StepBegin(step=4, **fields)
    return StepCall(begin, gradients or [GRADIENT], FLOAT32, (), FLOAT32, sent=True)


def doubt_about(failed: StepCall) -> Doubt:
    doubt = Doubt.after(failed, 1)
    assert doubt is not None
    return doubt


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1001])
def test_a_fingerprint_tells_arrays_apart(dtype: Any, count: int) -> None:
    array = np.random.default_rng(count).standard_normal(count).astype(dtype)
    own = fingerprint_of_arrays([array])
    assert fingerprint_of_arrays([array.copy()]) == own
    for at in {0, count - 1} if count else ():
        other = array.copy()
        other[at] = -other[at]
        assert fingerprint_of_arrays([other]) != own
    if count > 1:
        assert fingerprint_of_arrays([array[::-1]]) != own
        assert fingerprint_of_arrays([-array]) != own
        assert fingerprint_of_arrays([np.roll(array, 1)]) != own
    if count:
        zeros = np.zeros_like(array)
        assert fingerprint_of_arrays([array, zeros]) != fingerprint_of_arrays([zeros, array])


def test_two_sign_changes_that_cancel_in_a_sum_of_bits_are_seen() -> None:
    """Both flip the top bit of a 64-bit word, which vanishes from a sum modulo 2^64."""
    other = np.ones(8, np.float32)
    other[[1, 3]] *= -1
    assert fingerprint_of_arrays([other]) != fingerprint_of_arrays([np.ones(8, np.float32)])


def test_views_and_copies_have_one_fingerprint() -> None:
    wide = np.arange(20, dtype=np.float32)
    assert fingerprint_of_arrays([wide[::2]]) == fingerprint_of_arrays([wide[::2].copy()])


def test_the_same_gradient_with_the_same_options_is_the_same_step() -> None:
    doubt = doubt_about(call())
    assert doubt.step == 4
    assert doubt.covers(call(GRADIENT.copy()))
    assert not doubt.covers(call(GRADIENT[::-1].copy()))
    assert not doubt.covers(call(GRADIENT.astype(BFLOAT16)))
    assert not doubt.covers(call(GRADIENT, GRADIENT))


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"hyperparameters": [optimizer_pb2.Hyperparameters(lr=0.5)]}, False),
        ({"loss_scale": 8.0}, False),
        ({"missing_tensors": [1]}, False),
        ({"weight": 2.0}, False),
        ({"gradient_dtype": 2}, False),
        ({"epoch": 3, "load": 5}, True),
        ({"reply": step_pb2.ReplyOptions(mode=step_pb2.REPLY_MODE_NONE)}, True),
        ({"overlap": True}, True),
        ({"in_shared_memory": True}, True),
        ({"traceparent": "00-1-2-01"}, True),
    ],
)
def test_options_that_change_the_step_count_and_those_of_its_reply_do_not(fields: dict[str, Any], same: bool) -> None:
    assert doubt_about(call()).covers(call(**fields)) == same


def test_a_feed_that_was_not_committed_leaves_no_doubt() -> None:
    failed = call()
    failed.feed = GradientFeed(["w"])
    assert Doubt.after(failed, 1) is None


def test_a_feed_that_was_committed_is_known_by_its_gradients() -> None:
    failed = call(np.empty_like(GRADIENT))
    failed.feed = GradientFeed(["w"])
    failed.feed.give("w", GRADIENT)
    failed.feed.commit()
    doubt = doubt_about(failed)
    assert doubt.covers(call())
    assert not doubt.covers(failed)  # a feed may still be made


def test_a_gradient_that_cannot_be_read_any_more_is_no_other_gradient() -> None:
    failed = call(np.empty_like(GRADIENT))
    failed.feed = GradientFeed(["w"])
    failed.feed.commit()
    assert not doubt_about(failed).covers(call(np.empty_like(GRADIENT)))


@pytest.mark.parametrize("applied", [True, False])
def test_the_error_of_the_encoding_is_kept_if_the_step_was_applied(applied: bool) -> None:
    failed = call()
    failed.feedback = ErrorFeedback(5)
    failed.feedback.keep(0, GRADIENT, GRADIENT - 1)
    doubt_about(failed).resolve(applied=applied)
    assert failed.feedback.residual.tolist() == [float(applied)] * 5
    failed.feedback.accept()
    assert failed.feedback.residual.tolist() == [float(applied)] * 5


def test_steps_whose_outcome_nobody_can_tell_are_not_repeated() -> None:
    untold, other = UntoldSteps(), call(GRADIENT + 1)
    untold.check(call())
    untold.add(doubt_about(call()))
    untold.add(doubt_about(other))
    untold.check(call(GRADIENT + 2))
    for repeated in (call(), other):
        with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied.*Pull") as refused:
            untold.check(repeated)
        assert refused.value.metadata == {"step_in_doubt": "4"}


def test_a_pull_forgets_the_steps_that_it_came_after_alone() -> None:
    untold = UntoldSteps()
    untold.add(doubt_about(call()))
    before = untold.doubts
    untold.add(doubt_about(call(GRADIENT + 1)))
    untold.forget(before)
    assert len(untold.doubts) == 2
    untold.forget(untold.doubts)
    assert untold.doubts == ()
    untold.add(doubt_about(call()))
    untold.forget()
    untold.check(call())


def test_the_error_of_the_encoding_is_dropped_with_a_step_whose_outcome_nobody_can_tell() -> None:
    failed = call()
    failed.feedback = ErrorFeedback(5)
    failed.feedback.keep(0, GRADIENT, GRADIENT - 1)
    UntoldSteps().add(doubt_about(failed))
    failed.feedback.accept()
    assert failed.feedback.residual.tolist() == [0.0] * 5


def test_a_half_applied_step_names_its_remedies() -> None:
    refusal = unfinished(7)
    assert isinstance(refusal, SessionNotReadyError)
    assert (refusal.reason, refusal.metadata) == (Reason.STEP_UNFINISHED, {"unfinished_step": "7"})
    assert "same gradients" in str(refusal) and "load_state" in str(refusal)
