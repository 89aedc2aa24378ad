"""Parameters and state of a session, in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.support.drawn_arrays import DTYPES, OPTIMIZERS, SHAPES, assert_close, bits, draw, state_bits


@pytest.mark.parametrize("name", DTYPES)
def test_parameters_are_pulled_in_any_encoding(client: stepwire.Client, name: str) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        masters, pulled = session.pull(), session.pull(dtype=name)
        assert isinstance(masters, dict)
        assert bits(pulled) == bits({key: value.astype(DTYPES[name]) for key, value in masters.items()})


def test_the_state_has_the_names_that_users_know(client: stepwire.Client, reference_adam: Any) -> None:
    adam = stepwire.Adam(amsgrad=True, betas=(0.5, 0.25))
    reference = reference_adam(draw(0), adam)
    with client.create_session(draw(0), optimizer=adam) as session:
        for seed in (1, 2):
            session.step(draw(seed))
            reference.step(draw(seed))
        state = session.state()
    assert list(state.slots) == ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert (state.step, state.tensor_steps) == (2, dict.fromkeys(SHAPES, 2))
    for slot, want in zip(state.slots, (reference.p, reference.m, reference.v, reference.largest), strict=True):
        assert_close(state.slots[slot], want)


@pytest.mark.parametrize("name", ["adamw", "amsgrad with L2 decay"])
def test_a_loaded_state_continues_bit_for_bit(client: stepwire.Client, name: str) -> None:
    """Warm, not cold: moments, and t, which the bias corrections hang on."""
    with (
        client.create_session(draw(0), optimizer=OPTIMIZERS[name]) as original,
        client.create_session(draw(99), optimizer=OPTIMIZERS[name]) as copy,
    ):
        for seed in (1, 2, 3):
            original.step(draw(seed))
        copy.load_state(original.state())
        assert copy.applied_step == 3
        assert state_bits(copy.state()) == state_bits(original.state())
        for seed in (4, 5):
            assert bits(copy.step(draw(seed))) == bits(original.step(draw(seed)))
        assert copy.last_result is not None
        assert (copy.last_result.step, copy.last_result.groups[0].t) == (5, 5)
        assert state_bits(copy.state()) == state_bits(original.state())


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (stepwire.SGD(lr=0.1, momentum=0.5), [{"momentum": 0.0}, {}, {"momentum": 0.0}, {"dampening": 0.5}, {}]),
        (stepwire.NAdam(), [{}, {"betas": (0.5, 0.9)}, {"momentum_decay": 0.5}, {}, {"betas": (0.0, 0.9)}]),
        (stepwire.RMSprop(momentum=0.5), [{}, {"momentum": 0.0}, {}, {"momentum": 0.0}, {}]),
    ],
)
def test_a_state_of_changed_numbers_continues_bit_for_bit(
    client: stepwire.Client, optimizer: Any, changes: list[dict[str, Any]]
) -> None:
    """After each step in another session, whose numbers never changed."""
    with client.create_session(draw(0), optimizer=optimizer) as straight:
        moved = client.create_session(draw(0), optimizer=optimizer)
        for seed, change in enumerate(changes, start=1):
            numbers = {"hyperparameters": change} if change else {}
            assert bits(moved.step(draw(seed), **numbers)) == bits(straight.step(draw(seed), **numbers))
            state = moved.state()
            moved.close()
            moved = client.create_session(draw(0), optimizer=optimizer)
            moved.load_state(state)
            assert state_bits(moved.state()) == state_bits(straight.state())
        moved.close()


@pytest.mark.parametrize("scalars", [{"w": 1.0}, dict.fromkeys(SHAPES, 2.0), dict.fromkeys(SHAPES, float("nan"))])
def test_scalars_that_are_none_are_refused(client: stepwire.Client, scalars: dict[str, float]) -> None:
    with client.create_session(draw(0), optimizer=stepwire.NAdam()) as session:
        state = dataclasses.replace(session.state(), step=1, tensor_scalars=scalars)
        with pytest.raises(
            stepwire.InvalidRequestError, match=r"tensor_scalars: ('\w' is missing|.* is not in \[0, 1\])"
        ):
            session.load_state(state)


def test_tensors_with_counts_of_their_own_keep_them(client: stepwire.Client, reference_adam: Any) -> None:
    """A loaded state may hold a different t for each tensor; each is corrected by its own."""
    parameters, zeros = draw(0), {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    counts = {"w": 0, "s": 5, "e": 2, "b": 9}
    state = stepwire.Snapshot(9, {"param": parameters, "exp_avg": zeros, "exp_avg_sq": zeros}, counts)
    with client.create_session(draw(7)) as session:
        session.load_state(state)
        answer = session.step(draw(1))
        assert isinstance(answer, dict)
        for name, t in counts.items():
            reference = reference_adam({name: parameters[name]}, stepwire.Adam())
            reference.t = t
            assert_close({name: answer[name]}, reference.step({name: draw(1)[name]}))
        assert session.state().tensor_steps == {name: t + 1 for name, t in counts.items()}
        assert session.last_result is not None
        assert (session.last_result.step, session.last_result.groups[0].t) == (10, 10)


def test_loading_parameters_keeps_moments_and_counts(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        before = session.state()
        session.load(draw(5))
        after = session.state()
        assert bits(after.slots["param"]) == bits(draw(5))
        assert (after.step, after.tensor_steps) == (1, before.tensor_steps)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert bits(after.slots[slot]) == bits(before.slots[slot])
        session.step(draw(2))
        assert session.applied_step == 2


def test_steps_never_go_back(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        early = session.state()
        session.step(draw(2))
        before = state_bits(session.state())
        with pytest.raises(stepwire.StepMismatchError, match="step numbers never go back"):
            session.load_state(early)
        assert state_bits(session.state()) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda state: {"slots": {"param": state.slots["param"]}}, "state.slots"),
        (lambda state: {"slots": state.slots | {"extra": {}}}, "state.slots"),
        (lambda state: {"slots": state.slots | {"exp_avg": {}}}, "state.slots['exp_avg']"),
        (lambda state: {"tensor_steps": {"w": 1}}, "state.tensor_steps"),
        (lambda state: {"tensor_steps": dict.fromkeys(SHAPES, 2**53)}, "open.tensor_steps"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    client: stepwire.Client, change: Callable[[Any], dict[str, Any]], field: str
) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        state = session.state()
        values = {"step": 5, "slots": state.slots, "tensor_steps": state.tensor_steps} | change(state)
        with pytest.raises(stepwire.InvalidRequestError) as refused:
            session.load_state(stepwire.Snapshot(**values))
        assert refused.value.metadata["field"] == field
        assert state_bits(session.state()) == state_bits(state)
