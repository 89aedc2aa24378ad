"""A session whose server does more: loss scaling, averages, missing gradients, micro-steps; and the order of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.support.drawn_arrays import assert_close, bits, draw, state_bits


def test_a_session_that_scales_tells_what_to_multiply_by(client: stepwire.Client) -> None:
    """It doubles after two clean steps, and halves after a step that is not finite, which changes nothing else."""
    parameters = draw(0)
    options: Any = {"loss_scaling": stepwire.LossScaling(initial_scale=64.0, growth_interval=2)}
    with client.create_session(parameters, **options) as session, client.create_session(parameters) as plain:
        assert (session.loss_scale, plain.loss_scale) == (64.0, None)
        for step, (finite, scale) in enumerate(zip((1, 1, 0, 1), (64.0, 128.0, 64.0, 64.0), strict=True), 1):
            factor = np.float32(session.loss_scale)
            scaled = {name: gradient * factor for name, gradient in draw(step).items()}
            if not finite:
                scaled["w"][1, 2] = np.inf
            session.step(scaled)
            if finite:
                plain.step(draw(step))
            assert session.last_result is not None
            assert (session.last_result.skipped, session.loss_scale) == (not finite, scale)
        assert bits(session.pull()) == bits(plain.pull())
        assert client.session(session.session_id).loss_scale == 64.0


def test_loss_scaling_moves_with_the_state(client: stepwire.Client) -> None:
    options: Any = {"loss_scaling": stepwire.LossScaling(initial_scale=8.0, growth_interval=2)}
    with client.create_session(draw(0), **options) as first, client.create_session(draw(1), **options) as second:
        for step in (1, 2, 3):
            first.step(draw(step))
        state = first.state()
        assert state.loss_scale == (16.0, 1)
        second.load_state(state)
        assert second.loss_scale == 16.0
        assert second.state().loss_scale == state.loss_scale
        for session in (first, second):
            session.step(draw(4))
        assert second.loss_scale == first.loss_scale == 32.0
        assert state_bits(second.state()) == state_bits(first.state())


def test_the_clients_own_loss_scale_is_divided_out(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as scaled, client.create_session(draw(0)) as plain:
        scaled.step({name: gradient * np.float32(256.0) for name, gradient in draw(1).items()}, loss_scale=256.0)
        plain.step(draw(1))
        assert scaled.last_result is not None and plain.last_result is not None
        assert scaled.last_result.grad_norm == plain.last_result.grad_norm
        assert bits(scaled.pull()) == bits(plain.pull())


def test_the_average_of_the_parameters_is_pulled(client: stepwire.Client) -> None:
    parameters = draw(0)
    average = {name: value.astype(np.float64) for name, value in parameters.items()}
    with client.create_session(parameters, parameter_average_decay=0.75) as session:
        assert bits(session.pull(average=True)) == bits(parameters)
        for step in (1, 2):
            stepped = session.step(draw(step))
            assert isinstance(stepped, dict)
            average = {name: value + 0.25 * (stepped[name] - value) for name, value in average.items()}
        assert_close(session.pull(average=True), average)
    with (
        client.create_session(parameters) as plain,
        pytest.raises(stepwire.InvalidRequestError, match="'param_average'"),
    ):
        plain.pull(average=True)


def test_a_tensor_without_a_gradient_stays_where_the_session_keeps_it(client: stepwire.Client) -> None:
    with client.create_session(draw(0), missing_gradient="keep") as session:
        first = session.step(draw(1))
        for gradients in ({name: draw(2)[name] for name in ("w", "s", "e")}, draw(2) | {"b": None}):
            second = session.step(gradients)
        assert isinstance(first, dict) and isinstance(second, dict)
        assert second["b"].tobytes() == first["b"].tobytes()
        assert (second["w"] != first["w"]).all()
        assert session.state().tensor_steps == {"w": 3, "s": 3, "e": 3, "b": 1}


def test_a_tensor_without_a_gradient_is_missed_where_the_session_rejects_that(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session:
        with pytest.raises(stepwire.InvalidRequestError, match="missing \\['b'\\]"):
            session.step({name: draw(1)[name] for name in ("w", "s", "e")})
        assert session.applied_step == 0


def test_micro_steps_answer_with_the_parameters_as_they_are(client: stepwire.Client) -> None:
    parameters = draw(0)
    with client.create_session(parameters, accumulation_steps=2) as session, client.create_session(parameters) as plain:
        assert bits(session.step(draw(1))) == bits(parameters)
        assert session.last_result is not None and session.last_result.accumulated
        session.step(draw(2))
        assert not session.last_result.accumulated
        plain.step({name: gradient + draw(2)[name] for name, gradient in draw(1).items()})
        assert bits(session.pull()) == bits(plain.pull())
        assert (session.applied_step, session.state().tensor_steps["w"]) == (2, 1)


CALLS: dict[str, Callable[[stepwire.Session], object]] = {
    "step": lambda session: session.step(draw(1)),
    "step_async": lambda session: session.step_async(draw(1), steps_in_flight=1),
    "attach": lambda session: session.attach(),
    "detach": lambda session: session.detach(),
    "pull": lambda session: session.pull(),
    "state": lambda session: session.state(),
    "load": lambda session: session.load(draw(1)),
    "info": lambda session: session.info(),
    "shared_gradients": lambda session: session.shared_gradients(),
    "close": lambda session: session.close(),
}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_within_on_tensor_is_refused_and_the_step_goes_on(target: str, channels: int, name: str) -> None:
    """The step waits for the function, so the call would wait for ever; known numbers may be read."""
    refused, steps = [], set()

    def call(tensor: str, values: Any) -> None:
        steps.add(session.applied_step)
        with pytest.raises(stepwire.InvalidRequestError, match="^on_tensor: the function called the session") as error:
            CALLS[name](session)
        refused.append(error.value)

    shapes = {"w": (400, 200), "b": (300, 200)}
    with stepwire.connect(target, channels=channels, timeout=120.0) as client:
        with client.create_session(draw(0, shapes=shapes), optimizer=stepwire.SGD(lr=1.0)) as session:
            assert len(session.shards) == channels
            session.step_async(draw(1, shapes=shapes), on_tensor=call).result(120.0)
            assert len(refused) == 2 and steps <= {0, 1}
            assert session.info().applied_step == session.applied_step == 1
            session.step(draw(2, shapes=shapes))


@pytest.mark.parametrize("channels", [1, 2])
def test_replies_have_the_order_of_the_gradients_and_pulls_that_of_the_creation(target: str, channels: int) -> None:
    """Groups lie in another order in the flat space."""
    created = {name: np.full(3, index, np.float32) for index, name in enumerate("dbca")}
    groups = [{"params": ["d"], "lr": 0.5}, {"params": ["c"], "lr": 0.25}]
    with stepwire.connect(target, channels=channels, timeout=120.0) as several:
        session = several.create_session(created, groups=groups, missing_gradient="keep")
        for order in ("acbd", "dbca"):
            assert list(session.step({name: created[name] for name in order})) == list(order)
        assert list(session.step({"a": created["a"], "d": created["d"]})) == list("dbca")
        assert list(session.pull()) == list("dbca")
        state = session.state()
        assert [list(named) for named in (*state.slots.values(), state.tensor_steps)] == [list("dbca")] * 4
        session.close()


def test_shared_arrays_have_the_order_of_the_creation(client: stepwire.Client) -> None:
    created = {name: np.zeros(3, np.float32) for name in "cab"}
    with client.create_session(created, groups=[{"params": ["c"]}]) as session:
        session.attach(transport="shm")
        shared = session.shared_gradients(), session.shared_parameters(), session.shared_parameters(private=True)
        assert [list(arrays) for arrays in shared] == [list("cab")] * 3
        found = client.session(session.session_id)
        assert list(found.pull()) == list("cab")


@pytest.mark.parametrize("channels", [1, 2])
def test_the_progress_of_a_load_is_told(target: str, channels: int, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, int]] = []
    with stepwire.connect(target, channels=channels, timeout=120.0) as client:
        with client.create_session({"w": np.zeros(160_000, np.float32)}) as session:
            assert len(session.shards) == channels
            session.load_state(session.state(), progress=lambda *given: told.append(given))
            assert told == sorted(told) and {total for _, total in told} == {3 * 640_000}
            assert told[-1] == (3 * 640_000, 3 * 640_000) and len(told) >= 3 * 640_000 // (64 << 10)
            session.load({"w": np.ones(160_000, np.float32)}, progress=lambda sent, total: 1 // 0)
            assert [record.getMessage().partition("; ")[2] for record in caplog.records] == ["the load goes on"]
            assert session.pull()["w"][0] == 1.0
