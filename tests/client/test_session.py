"""A session against a real server: steps by the formula, state in and out, and who holds the slot."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import stepwire

BFLOAT16 = ml_dtypes.bfloat16
Arrays = dict[str, npt.NDArray[Any]]
SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 3), "s": (), "e": (0, 4), "b": (7,)}
# Half a unit in the last place of each encoding, relative to the value.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16, "float16": np.float16}
OPTIMIZERS = {
    "adam": stepwire.Adam(lr=0.01),
    "adam with L2 decay": stepwire.Adam(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6),
    "adamw": stepwire.AdamW(lr=0.02, weight_decay=0.2),
    "amsgrad": stepwire.Adam(lr=0.01, amsgrad=True, betas=(0.5, 0.6)),
    "amsgrad with L2 decay": stepwire.Adam(lr=0.01, amsgrad=True, weight_decay=0.1),
    "maximize": stepwire.Adam(lr=0.01, maximize=True, weight_decay=0.1),
    "no bias correction": stepwire.Adam(lr=0.001, formula="no_bias_correction"),
}


def draw(seed: int, dtype: npt.DTypeLike = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def assert_close(got: Any, want: Arrays, rounding: float = 0.0) -> None:
    """Compare with a float64 reference: a few float32 roundings a step, and one more of the answer's encoding."""
    assert list(got) == list(want)
    for name, expected in want.items():
        assert got[name].shape == expected.shape
        error = np.abs(got[name].astype(np.float64) - expected)
        assert (error <= 4e-7 + (2e-6 + rounding) * np.abs(expected)).all(), f"{name}: off by {error.max()}"


def bits(arrays: Any) -> dict[str, bytes]:
    named = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    return {str(name): array.tobytes() for name, array in named}


def state_bits(state: stepwire.Snapshot) -> tuple[Any, ...]:
    numbers = (state.step, state.tensor_steps, state.tensor_scalars)
    return *numbers, {slot: bits(arrays) for slot, arrays in state.slots.items()}


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


def test_another_client_takes_over_only_on_purpose(client: stepwire.Client, target: str) -> None:
    with client.create_session(draw(0)) as first, stepwire.connect(target) as elsewhere:
        first.step(draw(1))
        second = elsewhere.session(first.session_id)
        second.step(draw(2))
        with pytest.raises(stepwire.FencedError):
            first.step(draw(3))
        with pytest.raises(stepwire.FencedError):
            first.attach()
        first.attach(take_over=True)
        assert first.applied_step == 2
        first.step(draw(3))
        with pytest.raises(stepwire.FencedError):
            second.step(draw(4))
        assert first.info().applied_step == 3


def test_a_detached_client_comes_back_with_its_token(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session, client.create_session(draw(0)) as other:
        for seed in (1, 2, 3):
            assert bits(session.step(draw(seed))) == bits(other.step(draw(seed)))
            session.detach()
            session.detach()
        session.attach()
        session.attach(transport="tcp")
        assert session.info().attached


@pytest.mark.parametrize("transport", ["", "carrier pigeon"])
def test_what_is_no_transport_is_refused_by_name(client: stepwire.Client, transport: str) -> None:
    with client.create_session(draw(0)) as session:
        with pytest.raises(stepwire.InvalidRequestError, match=f"transport: {transport!r} is no transport") as refused:
            session.attach(transport=transport)
        assert refused.value.metadata == {"field": "transport"}


def test_a_session_tells_how_it_stands(client: stepwire.Client) -> None:
    with client.create_session(draw(0), label="mine") as session:
        info = session.info()
        assert (info.session_id, info.label, info.applied_step) == (session.session_id, "mine", 0)
        assert (info.ready, info.attached) == (True, False)
        session.step(draw(1))
        info = session.info()
        assert (info.applied_step, info.attached) == (1, True)


def test_a_block_ends_the_session_and_closing_twice_is_harmless(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        session.step(draw(2))
    session.close()
    with pytest.raises(stepwire.SessionNotFoundError) as gone:
        session.step(draw(3))
    assert gone.value.metadata == {"session_id": session.session_id, "last_known_step": "2"}
    assert "knows to be applied is 2" in str(gone.value)
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()


def test_closing_after_the_client_is_harmless(target: str) -> None:
    with stepwire.connect(target) as client:
        session = client.create_session(draw(0), keep=True)
    session.close()
    with stepwire.connect(target) as client:
        client.session(session.session_id).close()


def test_threads_take_turns(client: stepwire.Client) -> None:
    """Every step is applied once, and none gets another's answer in part."""
    failures: list[BaseException] = []
    with client.create_session({"w": np.zeros(4, np.float32)}, optimizer=stepwire.Adam(lr=0.5)) as session:

        def work() -> None:
            try:
                for _ in range(20):
                    answer = session.step({"w": np.ones(4, np.float32)})
                    assert len(set(answer["w"].tolist())) == 1  # type: ignore[call-overload]
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert session.applied_step == session.info().applied_step == 60


# --- what the server does besides ---------------------------------------------------------------------------------


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


# --- the order of names ---------------------------------------------------------------------------------


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
