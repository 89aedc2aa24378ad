"""Steps of a session against a real server: by the formula, in every encoding and container."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from tests.support.drawn_arrays import DTYPES, OPTIMIZERS, SHAPES, Arrays, assert_close, bits, draw, state_bits

# Half a unit in the last place of each encoding, relative to the value.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_follow_the_formula(client: stepwire.Client, reference_adam: Any, name: str) -> None:
    parameters = draw(0)
    reference = reference_adam(parameters, OPTIMIZERS[name])
    with client.create_session(parameters, optimizer=OPTIMIZERS[name]) as session:
        for seed in range(1, 7):
            assert_close(session.step(draw(seed)), reference.step(draw(seed)))
            assert session.applied_step == seed
        assert_close(session.pull(), reference.p)


@pytest.mark.parametrize("reply", DTYPES)
@pytest.mark.parametrize("sent", DTYPES)
def test_encodings_are_rounded_once_each_way(
    client: stepwire.Client, reference_adam: Any, sent: str, reply: str
) -> None:
    """The reference is fed what arrives, the gradient in its encoding, and the masters stay float32."""
    parameters = draw(0)
    reference = reference_adam(parameters, stepwire.Adam(lr=0.01))
    options = {"optimizer": stepwire.Adam(lr=0.01), "gradient_dtype": sent, "reply_dtype": DTYPES[reply]}
    with client.create_session(parameters, **options) as session:
        for seed in range(1, 4):
            answer = session.step(draw(seed))
            want = reference.step(draw(seed, DTYPES[sent]))
            assert {array.dtype for array in answer.values()} == {np.dtype(DTYPES[reply])}  # type: ignore[union-attr]
            assert_close(answer, want, ROUNDING[reply])
        assert_close(session.pull(), reference.p)


def test_a_step_may_choose_its_own_encodings(client: stepwire.Client, reference_adam: Any) -> None:
    reference = reference_adam(draw(0), stepwire.Adam())
    with client.create_session(draw(0)) as session:
        answer = session.step(draw(1), gradient_dtype="float16", reply_dtype="bfloat16")
        assert_close(answer, reference.step(draw(1, np.float16)), ROUNDING["bfloat16"])
        answer = session.step(draw(2))
        assert {array.dtype for array in answer.values()} == {np.dtype(np.float32)}  # type: ignore[union-attr]
        assert_close(answer, reference.step(draw(2)))


@pytest.mark.parametrize("name", DTYPES)
def test_gradients_are_taken_in_every_dtype_and_sent_as_the_session_says(
    client: stepwire.Client, reference_adam: Any, name: str
) -> None:
    reference = reference_adam(draw(0), stepwire.Adam())
    with client.create_session(draw(0)) as session:
        assert_close(session.step(draw(1, DTYPES[name])), reference.step(draw(1, DTYPES[name])))


def test_numbers_of_one_step_do_not_outlive_it(client: stepwire.Client, reference_adam: Any) -> None:
    reference = reference_adam(draw(0), stepwire.Adam(lr=0.01))
    overrides: list[dict[str, Any]] = [
        {"lr": 0.5},
        {},
        {"betas": (0.25, 0.5)},
        {"weight_decay": 0.25, "maximize": True},
        {"eps": 0.125, "beta2": 0.75},
        {},
    ]
    with client.create_session(draw(0), optimizer=stepwire.Adam(lr=0.01)) as session:
        for seed, values in enumerate(overrides, 1):
            answer = session.step(draw(seed), hyperparameters=values)
            assert_close(answer, reference.step(draw(seed), **values))
            assert session.last_result is not None
            assert session.last_result.groups[0].hyperparameters == (
                stepwire.Adam(lr=0.01).hyperparameters().replace(values)
            )


def test_lr_is_short_for_the_learning_rate_of_all_groups(client: stepwire.Client, reference_adam: Any) -> None:
    groups = [{"params": ["b", "s"], "lr": 0.5, "eps": 0.25}]
    with client.create_session(draw(0), groups=groups) as session:
        session.step(draw(1), lr=0.125)
        assert session.last_result is not None
        assert [(group.hyperparameters.lr, group.hyperparameters.eps) for group in session.last_result.groups] == [
            (0.125, 1e-8),
            (0.125, 0.25),
        ]


def test_each_group_has_its_own_numbers_and_overrides(client: stepwire.Client, reference_adam: Any) -> None:
    own, other = stepwire.Adam(lr=0.02, weight_decay=0.1), stepwire.Adam(lr=0.3, betas=(0.5, 0.6))
    first, second = {"w": SHAPES["w"], "e": SHAPES["e"]}, {"b": SHAPES["b"], "s": SHAPES["s"]}
    references = reference_adam(draw(0, shapes=first), own), reference_adam(draw(9, shapes=second), other)
    groups = [{"params": ["b", "s"], "lr": 0.3, "betas": (0.5, 0.6), "weight_decay": 0.0}]
    with client.create_session(draw(0, shapes=first) | draw(9, shapes=second), optimizer=own, groups=groups) as session:
        for seed in (1, 2, 3):
            overrides = [{"lr": 0.01 * seed}, {"eps": 1e-3 * seed}]
            gradients = draw(seed, shapes=first), draw(-seed % 97, shapes=second)
            answer = session.step(gradients[0] | gradients[1], hyperparameters=overrides)
            assert isinstance(answer, dict)
            for shapes, reference, gradient, values in zip(
                (first, second), references, gradients, overrides, strict=True
            ):
                assert_close({name: answer[name] for name in shapes}, reference.step(gradient, **values))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "hyperparameters[0].lr"),
        ({"hyperparameters": {"beta1": 1.0}}, "hyperparameters[0].beta1"),
        ({"hyperparameters": {"momentum": 0.5}}, "hyperparameters[0].momentum"),
        ({"hyperparameters": [{}, {}]}, "hyperparameters"),
        ({"hyperparameters": []}, "hyperparameters"),
        ({"gradient_dtype": "float64"}, "gradient_dtype"),
        ({"reply_dtype": "int8"}, "reply_dtype"),
        ({"timeout": -1.0}, "timeout"),
        ({"out": {}}, "out"),
    ],
)
def test_a_wrong_option_of_a_step_is_refused_and_uses_up_nothing(
    client: stepwire.Client, options: dict[str, Any], field: str
) -> None:
    with client.create_session(draw(0)) as session:
        before = state_bits(session.state())
        with pytest.raises(stepwire.InvalidRequestError) as refused:
            session.step(draw(1), **options)
        assert refused.value.metadata == {"field": field}
        assert state_bits(session.state()) == before
        session.step(draw(1))
        assert session.applied_step == 1


@pytest.mark.parametrize(
    "change", [{"w": np.zeros((3, 5), np.float32)}, {"w": np.zeros((5, 3))}, {"x": np.zeros(1, np.float32)}]
)
def test_wrong_gradients_are_refused_and_use_up_nothing(client: stepwire.Client, change: Arrays) -> None:
    with client.create_session(draw(0)) as session:
        with pytest.raises(stepwire.InvalidRequestError, match="gradients"):
            session.step(draw(1) | change)
        session.step(draw(1))
        assert session.applied_step == 1


def test_containers_of_steps_come_back_as_they_went(client: stepwire.Client) -> None:
    arrays = [np.float32([1, 2, 3]), np.float32(4), np.zeros((2, 0), np.float32)]
    named = {str(index): array for index, array in enumerate(arrays)}
    with client.create_session(arrays) as one, client.create_session(arrays) as other:
        as_list, as_dict = one.step(arrays), other.step(named)
        assert isinstance(as_list, list)
        assert isinstance(as_dict, dict)
        assert bits(as_list) == bits(as_dict)
        assert bits(one.step(tuple(arrays))) == bits(other.step(named))


def test_a_model_of_nothing_but_empty_tensors_steps(client: stepwire.Client) -> None:
    empty = {"a": np.zeros((0, 3), np.float32), "b": np.zeros(0, np.float32)}
    with client.create_session(empty) as session:
        for step in (1, 2):
            answer = session.step(empty)
            assert {name: array.shape for name, array in answer.items()} == {"a": (0, 3), "b": (0,)}  # type: ignore[union-attr]
            assert session.applied_step == step
        state = session.state()
        assert (state.step, state.tensor_steps) == (2, {"a": 2, "b": 2})


@pytest.mark.parametrize("reply", DTYPES)
def test_a_model_of_many_messages(client: stepwire.Client, reference_adam: Any, reply: str) -> None:
    """Two groups with padding between, a dozen messages of 64 KiB, boundaries inside tensors."""
    shapes = {"embedding": (301, 211), "w": (190, 180), "b": (181,)}
    adam = stepwire.AdamW(lr=0.01)
    parameters, reference = draw(0, shapes=shapes), reference_adam(draw(0, shapes=shapes), adam)
    with client.create_session(
        parameters, optimizer=adam, groups=[{"params": ["w", "b"]}], reply_dtype=reply
    ) as session:
        for seed in (1, 2):
            want = reference.step(draw(seed, shapes=shapes))
            answer = session.step(draw(seed, shapes=shapes))
            assert isinstance(answer, dict)
            assert_close({name: answer[name] for name in shapes}, want, ROUNDING[reply])
        state = session.state()
        norm = np.sqrt(sum((draw(2, shapes=shapes)[name].astype(np.float64) ** 2).sum() for name in shapes))
        assert session.last_result is not None
        assert session.last_result.grad_norm == np.float32(norm)
    assert_close({name: state.slots["exp_avg"][name] for name in shapes}, reference.m)
    assert_close({name: state.slots["exp_avg_sq"][name] for name in shapes}, reference.v)


def test_answers_are_written_into_the_arrays_that_were_given(client: stepwire.Client) -> None:
    out = draw(5)
    with client.create_session(draw(0)) as session, client.create_session(draw(0)) as other:
        assert session.step(draw(1), out=out) is out
        assert bits(out) == bits(other.step(draw(1)))
        model = draw(0)
        for seed in (2, 3):
            session.step(draw(seed), out=model)
        assert bits(model) == bits(session.pull())


def test_a_large_answer_that_is_kept_or_written_changes_no_other(client: stepwire.Client) -> None:
    """Its memory is used again once nothing shows it: `ReplyMemory`."""
    size, answers = 1 << 18, []
    with client.create_session({"w": np.zeros(size, np.float32)}, optimizer=stepwire.SGD(lr=1.0)) as session:
        gradient = {"w": np.ones(size, np.float32)}
        kept = session.step(gradient)["w"][-3:]  # a slice, for ever
        for _ in range(4):
            answers.append(session.step(gradient)["w"])
            answers[-1][0] = 7.0
            del answers[:-2]
        last = session.step(gradient)["w"]
    assert (kept.tolist(), last[0], last[-1]) == ([-1.0] * 3, -6.0, -6.0)
    assert [(answer[0], answer[-1]) for answer in answers] == [(7.0, -4.0), (7.0, -5.0)]


def test_out_may_be_a_tuple_of_arrays(client: stepwire.Client) -> None:
    parameters = [np.float32([1, 2]), np.float32([3])]
    out = (np.zeros(2, np.float32), np.zeros(1, np.float32))
    with client.create_session(parameters) as session:
        session.step(parameters, out=out)  # type: ignore[arg-type]
        assert bits(out) == bits(session.pull())


def test_the_result_of_the_last_step_is_kept(client: stepwire.Client) -> None:
    gradients = draw(1)
    with client.create_session(draw(0), groups=[{"params": ["b"]}]) as session:
        assert session.last_result is None
        session.step(gradients)
        result = session.last_result
        assert result is not None
        session.step(draw(2))
        assert session.last_result is not None
        assert (session.last_result.step, session.last_result.groups[0].t) == (2, 2)
    squares = {name: (gradients[name].astype(np.float64) ** 2).sum() for name in gradients}
    assert (result.step, result.durable_step, result.epoch) == (1, 0, 1)
    assert (result.replayed, result.skipped, result.non_finite_count) == (False, False, 0)
    assert result.grad_norm == np.float32(np.sqrt(sum(squares.values())))
    assert result.groups[1].grad_norm == np.float32(np.sqrt(squares["b"]))
    assert [group.t for group in result.groups] == [1, 1]
    assert min(result.receive_seconds, result.queue_seconds, result.apply_seconds) >= 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_default(client: stepwire.Client, bad: float) -> None:
    gradients = draw(1)
    gradients["b"][4] = gradients["w"][2, 1] = bad
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        before = state_bits(session.state())
        with pytest.raises(stepwire.NonFiniteGradientError, match="tensor 'w' holds NaN or Inf") as refused:
            session.step(gradients)
        assert refused.value.metadata == {"tensor": "w", "element": "7", "non_finite_count": "2"}
        assert state_bits(session.state()) == before
        session.step(draw(2))
        assert session.applied_step == 2


def test_a_skipped_step_uses_up_its_number_and_nothing_else(client: stepwire.Client, reference_adam: Any) -> None:
    bad, reference = draw(1), reference_adam(draw(0), stepwire.Adam())
    bad["s"][...] = np.nan
    with client.create_session(draw(0), non_finite="skip") as session:
        assert bits(session.step(bad)) == bits(draw(0))
        result = session.last_result
        assert result is not None
        assert (result.step, result.skipped, result.non_finite_count, result.groups[0].t) == (1, True, 1, 0)
        assert_close(session.step(draw(2)), reference.step(draw(2)))
        assert (session.applied_step, session.state().tensor_steps["w"]) == (2, 1)


def test_an_allowed_gradient_is_applied_as_it_is(client: stepwire.Client) -> None:
    bad = draw(1)
    bad["w"][0, 0] = np.nan
    with client.create_session(draw(0), non_finite="allow") as session:
        answer = session.step(bad)
        assert isinstance(answer, dict)
        assert np.isnan(answer["w"]).sum() == 1
        assert np.isnan(answer["w"][0, 0])
        assert session.last_result is not None
        assert (session.last_result.skipped, session.last_result.non_finite_count) == (False, 1)
