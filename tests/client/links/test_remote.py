"""The link to one server: steps in doubt, against a real server."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import DeadlineExceededError, FencedError, StepMismatchError
from stepwire.links import hold as hold_module
from stepwire.steps.gradient_feed import GradientFeed
from tests.client.links.made_sessions import FOURS, ONES, TWOS, Create, first
from tests.support.lost_replies import lost_replies


def fail(session: stepwire.Session, gradient: Any, *, applied: bool, **options: Any) -> None:
    """Take a step whose outcome stays unknown."""
    with lost_replies(applied=applied), pytest.raises(DeadlineExceededError):
        session.step(gradient, **options)
    known = session.statistics()
    assert (known.step_in_doubt, known.reply_begun) == (session.applied_step + 1, applied)


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_is_the_same_step(create: Create, applied: bool) -> None:
    session = create()
    session.step(ONES)
    fail(session, TWOS, applied=applied)
    assert first(session.step({"w": TWOS["w"].copy()})) == -3.0
    assert session.last_result is not None
    assert (session.last_result.replayed, session.applied_step) == (applied, 2)
    assert session.statistics().step_in_doubt is None


@pytest.mark.parametrize(("applied", "step", "value"), [(True, 2, -3.0), (False, 1, -2.0)])
def test_another_gradient_is_another_step(create: Create, applied: bool, step: int, value: float) -> None:
    """It never gets the reply of the step that failed, and is applied itself."""
    session = create()
    fail(session, ONES, applied=applied)
    assert first(session.step(TWOS)) == value
    assert session.last_result is not None
    assert (session.last_result.replayed, session.applied_step) == (False, step)
    assert session.info().applied_step == step


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("other", [[0.0, 2.0, 1.0], [-1.0, -2.0, 0.0]], ids=["permuted", "negated"])
def test_a_gradient_of_the_same_bits_in_other_places_is_another_step(
    create: Create, applied: bool, other: list[float]
) -> None:
    session, gradient = create(), {"w": np.float32([1, 2, 0])}
    fail(session, gradient, applied=applied)
    stepped: Any = session.step({"w": np.float32(other)})
    assert stepped["w"].tolist() == (-np.float32(other) - applied * gradient["w"]).tolist()


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_with_other_options_is_another_step(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    assert first(session.step(ONES, lr=0.5)) == -0.5 - applied
    assert session.info().applied_step == 1 + applied


@pytest.mark.parametrize("applied", [True, False])
def test_the_reply_may_be_another_one(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    assert session.step(ONES, reply="none") == {}
    assert session.info().applied_step == 1


def test_a_step_may_fail_again_and_again(create: Create) -> None:
    session = create()
    for applied in (False, False, True, True):
        fail(session, ONES, applied=applied)
    assert first(session.step(ONES)) == -1.0
    fail(session, ONES, applied=True)
    fail(session, TWOS, applied=True)
    assert first(session.step(TWOS)) == -4.0
    assert session.info().applied_step == 3


def test_a_doubt_outlives_another_gradient_that_could_not_even_attach(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create()
    fail(session, ONES, applied=True)
    with monkeypatch.context() as patched:
        patched.setattr("stepwire.links.hold.open_stream", nobody)
        with pytest.raises(DeadlineExceededError):
            session.step(TWOS)
    assert first(session.step(ONES)) == -1.0
    assert session.last_result is not None and session.last_result.replayed


def nobody(*_: Any) -> Any:
    raise DeadlineExceededError("nobody there")


@pytest.mark.parametrize("applied", [True, False])
def test_attaching_tells_the_outcome_and_forgets_nothing(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    session.attach()
    assert session.applied_step == applied
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_a_load_settles_the_step_before_it(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    session.load({"w": np.full(3, 10.0, np.float32)})
    assert (session.applied_step, session.statistics().step_in_doubt) == (applied, None)
    assert first(session.step(ONES)) == 9.0
    assert session.info().applied_step == 1 + applied


@pytest.mark.parametrize("applied", [True, False])
def test_a_loaded_state_settles_the_step_before_it(create: Create, applied: bool) -> None:
    session = create()
    session.step(ONES)
    fail(session, TWOS, applied=applied)
    state = stepwire.Snapshot(5, {"param": {"w": np.full(3, 10.0, np.float32)}}, {"w": 5})
    session.load_state(state)
    assert session.applied_step == 5
    assert first(session.step(TWOS)) == 8.0
    assert session.info().applied_step == 6


@pytest.mark.parametrize(("applied", "value"), [(True, -3.0), (False, -2.0)])
def test_steps_in_the_background_are_no_exception(create: Create, applied: bool, value: float) -> None:
    session = create()
    with lost_replies(applied=applied):
        failed = session.step_async(ONES)
        assert isinstance(failed.exception(30.0), DeadlineExceededError)
    assert session.statistics().background_failures == 1
    assert first(session.step_async(TWOS).result(120.0)) == value
    assert session.statistics().steps_in_flight == 0


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_that_was_fed_is_repeated_by_its_gradient(create: Create, applied: bool) -> None:
    """As `stepwire.torch` does, whose backward pass had begun the step."""
    session, feed = create(), GradientFeed(["w"])
    with lost_replies(applied=applied):
        failed: Future[Any] = session.step_async({"w": np.empty(3, np.float32)}, feed=feed)
        feed.give("w", ONES["w"])
        feed.commit()
        assert isinstance(failed.exception(30.0), DeadlineExceededError)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


def test_a_step_that_was_given_up_leaves_no_doubt(create: Create) -> None:
    session, feed = create(), GradientFeed(["w"])
    given_up = session.step_async({"w": np.empty(3, np.float32)}, feed=feed)
    feed.give("w", ONES["w"])
    feed.abort()
    assert given_up.exception(30.0) is not None
    assert session.statistics().step_in_doubt is None
    assert first(session.step(TWOS)) == -2.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_after_another_client_stepped_is_refused(
    client: stepwire.Client, create: Create, applied: bool
) -> None:
    """The number of the step in doubt is of either client by now: its repetition could apply the gradient twice."""
    session = create()
    fail(session, ONES, applied=applied)
    client.session(session.session_id).step(TWOS)
    with pytest.raises(FencedError):
        session.step(ONES)
    session.attach(take_over=True)
    for _ in range(2):
        with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
            session.step(ONES)
    session.attach(take_over=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert session.info().applied_step == 1 + applied
    assert first(session.pull()) == -2.0 - applied
    assert first(session.step(ONES)) == -3.0 - applied


@pytest.mark.parametrize("settle", ["pull", "load", "step"])
def test_whoever_knows_the_present_state_may_send_any_gradient(
    client: stepwire.Client, create: Create, settle: str
) -> None:
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    session.attach(take_over=True)
    settled = {
        "pull": lambda: session.pull(),
        "load": lambda: session.load({"w": np.full(3, -3.0, np.float32)}),
        "step": lambda: session.step({"w": np.zeros(3, np.float32)}),
    }
    settled[settle]()
    assert first(session.step(ONES)) == -4.0


def test_a_gradient_that_certainly_was_not_applied_is_a_new_step(client: stepwire.Client, create: Create) -> None:
    """The other client held the worker and stepped nothing, so the number of the step in doubt is free."""
    session = create()
    fail(session, ONES, applied=False)
    client.session(session.session_id).attach()
    session.attach(take_over=True)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


def test_another_gradient_that_fails_after_it_changes_nothing(client: stepwire.Client, create: Create) -> None:
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    session.attach(take_over=True)
    fail(session, FOURS, applied=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert first(session.step(FOURS)) == -7.0
    assert first(session.step(ONES)) == -8.0


def test_a_take_over_whose_reply_is_lost_hides_the_outcome_as_well(client: stepwire.Client, create: Create) -> None:
    """The token is gone, and the next step acquires the worker by itself."""
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    with pytest.MonkeyPatch.context() as patched:
        open_stream = hold_module.open_stream

        def lost(route: Any, opening: Any, *arguments: Any) -> Any:
            open_stream(route, opening, *arguments)[0].close()
            raise DeadlineExceededError("the reply was lost")

        patched.setattr(hold_module, "open_stream", lost)
        with pytest.raises(DeadlineExceededError):
            session.attach(take_over=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert first(session.pull()) == -3.0


def test_a_worker_taken_back_from_nobody_keeps_the_doubt(create: Create) -> None:
    session = create()
    fail(session, ONES, applied=True)
    session.attach(take_over=True)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_error_feedback_goes_on_as_if_the_reply_had_come(create: Create, applied: bool) -> None:
    options: Any = {"gradient_dtype": "int8", "error_feedback": True}
    disturbed, calm = create(**options), create(**options)
    gradients = [{"w": np.float32([1.0, 0.3, -0.7]) * scale} for scale in (1.0, 0.9, 0.8)]
    fail(disturbed, gradients[0], applied=applied)
    for gradient in gradients[1:]:
        disturbed.step(gradient)
    for gradient in gradients[0 if applied else 1 :]:
        calm.step(gradient)
    assert disturbed.pull()["w"].tobytes() == calm.pull()["w"].tobytes()  # type: ignore[call-overload]
