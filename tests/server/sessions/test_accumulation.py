"""Accumulation in a session: sums that are dropped, repeated steps, and a session that moves in the middle of one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire import errors
from stepwire.layout import TensorSpec
from stepwire.optimizers import SGD
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling
from stepwire_server.engines import CpuEngine
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config
from tests.server.session_driver import Array, apply_step, everything, load, make_session

SIZE = 7
SCALING = LossScaling(initial_scale=8.0, growth_interval=2, growth_factor=2.0, backoff_factor=0.5)
BAD = (np.inf, -np.inf, np.nan)


def session_of(**treatment: Any) -> Session:
    treated = GradientTreatment(**treatment)
    config = make_config(TensorSpec("w", (SIZE,)), optimizer=SGD(lr=1.0), treatment=treated)
    return make_session(config, CpuEngine(threads=1, use_numba=False))


def continued(state: tuple[Snapshot, dict[str, Array]], **treatment: Any) -> Session:
    """Make a session that goes on from the state of another, as a pull tells it."""
    snapshot, slots = state
    session = session_of(**treatment)
    assert load(session, slots, snapshot)
    return session


def gradient(step: int, scale: float, bad: float | None) -> Array:
    values = np.arange(1, SIZE + 1, dtype=np.float32) * np.float32(step * scale)
    if bad is not None:
        values[step % SIZE] = bad
    return values


class Model:
    """The arithmetic of sums, as `torch.amp.GradScaler` has it: `update` is called once for each sum."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.param, self.sum = np.zeros(SIZE), np.zeros(SIZE)
        self.scale, self.clean, self.updates = 8.0, 0, 0

    def step(self, step: int, bad: float | None) -> tuple[bool, bool, float]:
        """Return whether the step is accumulated, whether it is skipped, and the scale after it."""
        with np.errstate(invalid="ignore"):
            self.sum = self.sum + gradient(step, 1.0, bad)
        if step % self.every:
            return True, False, self.scale
        finite = bool(np.isfinite(self.sum).all())
        if finite:
            self.param, self.updates, self.clean = self.param - self.sum, self.updates + 1, self.clean + 1
            if self.clean == 2:
                self.scale, self.clean = self.scale * 2.0, 0
        else:
            self.scale, self.clean = self.scale * 0.5, 0
        self.sum = np.zeros(SIZE)
        return False, not finite, self.scale


PATTERNS = [(every, pattern) for every in (1, 2, 3) for pattern in itertools.product((False, True), repeat=2 * every)]


@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
def test_windows_are_those_of_the_gradient_scaler(moves: bool) -> None:
    """Every pattern of micro-steps that are not finite, over two windows; a repeated step changes nothing."""
    for every, pattern in PATTERNS:
        treatment: dict[str, Any] = {"accumulation_steps": every, "loss_scaling": SCALING}
        session, model = session_of(**treatment), Model(every)
        for step, spoilt in enumerate(pattern, 1):
            bad = BAD[step % 3] if spoilt else None
            sent = gradient(step, model.scale, bad)
            result, reply = apply_step(session, sent)
            expected = model.step(step, bad)
            assert (result.accumulated, result.skipped, result.loss_scale) == expected, (every, pattern, step)
            assert (result.non_finite_count > 0) == (spoilt or result.skipped)
            before = everything(session)
            again, replayed = apply_step(session, sent, step=step)
            assert (again.replayed, again._replace(replayed=False)) == (True, result)
            after = everything(session)
            assert before[0] == after[0] and reply.tobytes() == replayed.tobytes()
            assert all(before[1][slot].tobytes() == after[1][slot].tobytes() for slot in session.slots)
            assert before[0].tensor_steps == (model.updates,)
            assert before[0].loss_scale == LossScale(model.scale, model.clean)
            np.testing.assert_array_equal(before[1]["param"], model.param)
            if every > 1:
                kept = before[1]["grad_accumulation"]
                np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(model.sum))
            if moves:
                session.close()
                session = continued(before, **treatment)
        session.close()


@pytest.mark.parametrize("policy", ["reject", "skip", "allow"])
def test_a_sum_that_was_loaded_is_checked_like_any_other(policy: Any) -> None:
    """A session whose client, or whose server before, left NaN in the sum."""
    session = session_of(accumulation_steps=3, non_finite=policy)
    poison = np.zeros(SIZE, np.float32)
    poison[2] = np.nan
    load(session, {"grad_accumulation": poison})
    if policy == "reject":
        for _ in range(2):
            with pytest.raises(errors.NonFiniteGradientError, match="load a grad_accumulation of zeros"):
                apply_step(session, gradient(1, 1.0, None))
        load(session, {"grad_accumulation": np.zeros(SIZE, np.float32)})
    results = [apply_step(session, gradient(step, 1.0, None))[0] for step in (1, 2, 3)]
    assert [result.skipped for result in results] == [False, False, policy == "skip"]
    assert [result.non_finite_count for result in results] == [0, 0, int(policy != "reject")]
    assert np.isnan(everything(session)[1]["param"]).any() == (policy == "allow")
    assert not everything(session)[1]["grad_accumulation"].any()


def test_a_refused_micro_step_leaves_the_window_as_it_is() -> None:
    session = session_of(accumulation_steps=2)
    apply_step(session, gradient(1, 1.0, None))
    with pytest.raises(errors.NonFiniteGradientError, match="step 2: the gradient of tensor 'w' holds NaN or Inf"):
        apply_step(session, gradient(2, 1.0, np.nan))
    result, reply = apply_step(session, gradient(2, 1.0, None))
    assert (result.step, result.accumulated, result.skipped) == (2, False, False)
    np.testing.assert_array_equal(reply, -3.0 * gradient(1, 1.0, None))


def test_only_sums_that_may_be_large_cost_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(accumulation_steps=4)
    squared: list[float | None] = []
    arrays = session._state.arrays
    square = arrays.sum_of_squares
    monkeypatch.setattr(
        arrays, "sum_of_squares", lambda *arguments: squared.append(arguments[4:] != ()) or square(*arguments)
    )
    for step, magnitude in enumerate((1.0, 1e30, 1e38, 1.0, 1.0, 1.0), 1):
        apply_step(session, np.full(SIZE, magnitude, np.float32))
        assert squared == [False, *([True] if step in (3, 4) else [])], step
        squared.clear()


def test_a_window_that_cannot_be_dropped_damages_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(accumulation_steps=2, non_finite="skip")
    apply_step(session, gradient(1, 1.0, np.nan))

    def broken(slot: str) -> None:
        raise OSError(slot)

    monkeypatch.setattr(session._state.arrays, "clear", broken)
    with pytest.raises(OSError, match="grad_accumulation"):
        apply_step(session, gradient(2, 1.0, None))
    with pytest.raises(errors.DataLossError, match="step 2 failed half-way"):
        apply_step(session, gradient(2, 1.0, None))
