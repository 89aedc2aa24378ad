"""Parameters that the program changes between two updates: the session follows them, as optax does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
from stepwire.errors import InvalidRequestError, StepMismatchError, UnavailableError  # noqa: E402
from stepwire.optax import sessions  # noqa: E402
from stepwire.optax.program import FLUSHED, after_update, is_same, masters  # noqa: E402
from tests.support.lost_replies import lost_replies  # noqa: E402

TARGET = np.float32([-1.0, 1.0, -2.0, 3.0])


def start(dtype: Any = jnp.float32) -> Any:
    return {"w": jnp.asarray([0.5, -0.5, 1.0, 2.0], dtype), "b": jnp.asarray([1.0, -1.0], dtype)}


def loss(params: Any) -> Any:
    w, b = (leaf.astype(jnp.float32) for leaf in (params["w"], params["b"]))
    return 0.5 * jnp.sum((w - TARGET) ** 2) + jnp.sum((b - 0.3) ** 4)


def trained(tx: Any, change: Callable[[int, Any], Any] = lambda step, params: params, steps: int = 24) -> Any:
    """Train under `jit`, with a change of the parameters after each update."""

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = start()
    state = tx.init(params)
    for step in range(steps):
        params, state = train(params, state)
        params = change(step, params)
    return params


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The parameters of each load."""
    seen: list[Any] = []
    load = stepwire.Session.load

    def counted(session: Any, parameters: Any, **options: Any) -> None:
        seen.append(parameters)
        load(session, parameters, **options)

    monkeypatch.setattr(stepwire.Session, "load", counted)
    yield seen


# --- as optax -------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[int, Any], Any]] = {
    "projected": lambda step, params: optax.projections.projection_non_negative(params),
    "clipped": lambda step, params: jax.tree.map(lambda leaf: jnp.clip(leaf, -0.6, 0.6), params),
    "replaced once": lambda step, params: start() if step == 12 else params,
    "one leaf replaced": lambda step, params: params | {"b": jnp.zeros(2)} if step == 3 else params,
    "moved by little": lambda step, params: jax.tree.map(lambda leaf: leaf * 1.0001, params),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_by_the_program_is_followed(client: stepwire.Client, name: str) -> None:
    make = {"learning_rate": 0.05, "weight_decay": 0.1}
    want = trained(optax.adamw(**make), CHANGES[name])
    got = trained(optax.with_extra_args_support(stepwire.optax.adamw(**make, server=client)), CHANGES[name])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "a scale behind": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "a constraint behind": lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    "reduce_on_plateau": lambda tx: optax.chain(
        tx, optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.05, cooldown=1)
    ),
    "conditionally_mask": lambda tx: optax.transforms.conditionally_mask(tx, lambda step, **_: step % 3 != 0),
    "conditionally_transform": lambda tx: optax.chain(
        optax.scale(0.01), optax.transforms.conditionally_transform(tx, lambda step, **_: step % 3 != 0)
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(3)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.05),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax_have_their_own_numbers(client: stepwire.Client, name: str) -> None:
    wrap = WRAPPERS[name]
    want = trained(optax.with_extra_args_support(wrap(optax.adamw(0.05, weight_decay=0.1))))
    ours = stepwire.optax.adamw(0.05, weight_decay=0.1, server=client)
    got = trained(optax.with_extra_args_support(wrap(ours)))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_lookahead(client: stepwire.Client) -> None:
    def outcome(fast: Any) -> Any:
        tx = optax.lookahead(fast, sync_period=4, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(start())
        state = tx.init(params)

        @jax.jit
        def train(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(13):
            params, state = train(params, state)
        return params

    want = outcome(optax.adam(0.05))
    got = outcome(stepwire.optax.adam(0.05, server=client))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


# --- the program's own rounding is no change ------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False], ids=["step", "update"])
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32")], ids="-".join
)
def test_nothing_is_sent_where_nothing_was_changed(
    client: stepwire.Client, loads: list[Any], dtypes: tuple[str, str], exact: bool
) -> None:
    """Another client's hand moves the server's parameters far between the steps, so that differences are rounded."""
    tx = stepwire.optax.sgd(1.0, server=client)
    generator = np.random.default_rng(3)

    def draw() -> Any:
        return {
            name: jnp.asarray(generator.standard_normal(200) * 10.0 ** generator.integers(-6, 3, 200), dtype)
            for name, dtype in zip("ab", dtypes, strict=True)
        }

    params = draw()
    state = tx.init(params)
    step, update = jax.jit(tx.step), jax.jit(tx.update)
    rounded = 0
    for moved in range(1, 9):
        tx.session(state).load(draw())
        if exact:
            params, state = step(params, draw(), state)
        else:
            updates, state = update(draw(), state, params)
            params = optax.apply_updates(params, updates)
            server: Any = tx.session(state).pull(dtype=dtypes[0])
            rounded += int((np.asarray(params["a"]) != server["a"]).sum())
        assert len(loads) == moved
    assert exact or rounded > 20


def xla_after_update(old: Any, new: Any) -> Any:
    @jax.jit
    def updated(old: Any, new: Any) -> Any:
        return optax.apply_updates(old, new.astype(jnp.float32) - old.astype(jnp.float32))

    return np.asarray(updated(old, new))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("exponents", [(-20, 20), (-149, -100), (100, 127)])
def test_the_sum_has_the_bits_of_the_program(dtype: Any, exponents: tuple[int, int]) -> None:
    """XLA may flush the smallest numbers to zero; everything else is the same to the bit."""
    generator = np.random.default_rng(5)
    count = 1 << 17

    def draw() -> Any:
        powers = np.ldexp(1.0, generator.integers(*exponents, count))
        most = float(jnp.finfo(dtype).max)
        return jnp.asarray((generator.standard_normal(count) * powers).clip(-most, most).astype(np.float32), dtype)

    old, new = draw(), draw()
    got, want = after_update(np.asarray(old), np.asarray(new)), xla_after_update(old, new)
    assert is_same(want, got)
    if exponents[0] > -100:
        np.testing.assert_array_equal(got, want)


def test_the_loss_of_a_difference_is_at_most_a_unit_in_its_last_place() -> None:
    """2^-23 of the difference, which this case reaches."""
    old, new = np.float32([1.0]), np.float32([2.0**24 + 2])
    after = xla_after_update(old, new)
    assert after.tolist() == after_update(old, new).tolist() == [2.0**24]
    assert (new - after) / (2.0**24 + 1) == pytest.approx(2.0**-23)


def test_what_is_no_number_stays_what_it_was() -> None:
    values = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0])
    assert is_same(values, values[[0, 1, 2, 4, 3]])
    assert not is_same(values, np.nan_to_num(values))
    assert not is_same(np.float32([1.0]), np.float32([np.nextafter(np.float32(1), np.float32(2))]))
    assert not is_same(np.float32([0.0]), np.float32([2 * FLUSHED]))
    assert not is_same(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))
    assert is_same(np.ones(3, np.float32), np.ones(3, jnp.bfloat16))


def test_parameters_of_another_shape_are_refused(client: stepwire.Client) -> None:
    tx = stepwire.optax.sgd(1.0, server=client)
    state = tx.init({"w": jnp.zeros(3)})
    with pytest.raises(InvalidRequestError, match=r"parameters\['w'\]: shape \(2,\) is not the session's \(3,\)"):
        tx.update({"w": jnp.zeros(3)}, state, {"w": jnp.zeros(2)})


@pytest.mark.parametrize("exact", [True, False], ids=["step", "update"])
def test_parameters_in_donated_memory(client: stepwire.Client, loads: list[Any], exact: bool) -> None:
    """The program writes its next parameters over the present ones."""
    tx = stepwire.optax.sgd(1.0, server=client)
    size = 1 << 16

    def train(params: Any, state: Any) -> Any:
        if exact:
            return tx.step(params, jax.tree.map(jnp.ones_like, params), state)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    double = jax.jit(lambda params: jax.tree.map(lambda leaf: 2 * leaf, params), donate_argnums=0)
    for run in (jax.jit(train, donate_argnums=(0, 1)), train):
        params = {"w": jnp.ones(size)}
        state = tx.init(params)
        expected = 1.0
        for changed in (False, True, False, True):
            params, state = run(params, state)
            expected -= 1.0
            if changed:
                params, expected = double(params), 2 * expected
            assert float(params["w"][0]) == float(params["w"][-1]) == expected
    assert len(loads) == 2


# --- half precision -------------------------------------------------------------------------------------


def test_masters_of_unchanged_elements_stay() -> None:
    held = {"w": np.float32([1 + 2.0**-12, 1 + 2.0**-12, np.nan])}
    given = {"w": np.asarray([1.0, 2.0, np.nan], jnp.bfloat16)}
    merged = masters(held, given, np.dtype(jnp.bfloat16))["w"]
    np.testing.assert_array_equal(merged, np.float32([1 + 2.0**-12, 2.0, np.nan]))


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids="-".join)
def test_a_change_of_one_element_keeps_the_masters_of_the_others(
    client: stepwire.Client, loads: list[Any], dtypes: tuple[str, str]
) -> None:
    tx = stepwire.optax.sgd(2.0**-13, server=client)
    params: Any = {"a": jnp.ones(3, dtypes[0]), "b": jnp.ones(2, dtypes[1])}
    ones = jax.tree.map(jnp.ones_like, params)
    params, state = tx.step(params, ones, tx.init(params))
    assert params["a"].tolist() == [1.0] * 3
    params["a"] = params["a"].at[1].set(4.0)
    params, state = tx.step(params, ones, state)
    held: Any = tx.session(state).pull()
    assert held["a"].tolist() == [1 - 2.0**-12, 4 - 2.0**-13, 1 - 2.0**-12]
    assert held["b"].tolist() == [1 - 2.0**-12] * 2
    assert len(loads) == 1


# --- exactly once ---------------------------------------------------------------------------------------

ONES = {"w": jnp.ones(3)}


@pytest.fixture
def sgd(client: stepwire.Client) -> Any:
    return stepwire.optax.sgd(1.0, server=client)


@pytest.mark.parametrize("applied", [False, True], ids=["step not applied", "reply lost"])
def test_changed_parameters_of_a_step_that_failed_are_sent_once(sgd: Any, loads: list[Any], applied: bool) -> None:
    params = {"w": jnp.full(3, 10.0)}
    state = sgd.init({"w": jnp.zeros(3)})
    with lost_replies(applied=applied), pytest.raises(UnavailableError):
        sgd.step(params, ONES, state)
    after, state = sgd.step(params, ONES, state)
    assert after["w"].tolist() == [9.0] * 3
    after, state = sgd.step(after, ONES, state)
    assert after["w"].tolist() == [8.0] * 3
    assert len(loads) == 1
    assert sgd.session(state).info().applied_step == 2


def test_other_parameters_for_a_step_that_was_applied_are_told(sgd: Any) -> None:
    params = {"w": jnp.zeros(3)}
    state = sgd.init(params)
    sgd.step(params, ONES, state)
    with pytest.raises(StepMismatchError, match="applied with other parameters, because one state was used for two"):
        sgd.step({"w": jnp.full(3, 10.0)}, ONES, state)


@pytest.mark.parametrize("applied", [False, True], ids=["step not applied", "reply lost"])
def test_other_parameters_after_a_step_that_failed(sgd: Any, applied: bool) -> None:
    """They are another step: it takes the place of the one that failed, or is refused because that one was applied."""
    params = {"w": jnp.zeros(3)}
    state = sgd.init(params)
    with lost_replies(applied=applied), pytest.raises(UnavailableError):
        sgd.step(params, ONES, state)
    other = {"w": jnp.full(3, 10.0)}
    if applied:
        with pytest.raises(StepMismatchError, match="again with other parameters, but the server had applied it"):
            sgd.step(other, ONES, state)
        assert sgd.step(params, ONES, state)[0]["w"].tolist() == [-1.0] * 3
    else:
        assert sgd.step(other, ONES, state)[0]["w"].tolist() == [9.0] * 3


def test_parameters_that_were_not_sent_are_sent_again(
    sgd: Any, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the program takes its change back: a load that fails may have been committed."""
    params, changed = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 10.0)}
    state = sgd.init(params)
    load = stepwire.Session.load

    def committed_without_a_reply(session: Any, parameters: Any) -> None:
        load(session, parameters)
        raise UnavailableError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(stepwire.Session, "load", committed_without_a_reply)
        with pytest.raises(UnavailableError, match="the reply was lost"):
            sgd.step(changed, ONES, state)
    assert sgd.step(params, ONES, state)[0]["w"].tolist() == [-1.0] * 3
    assert len(loads) == 2


def test_a_session_found_again_has_the_parameters_of_the_program(client: stepwire.Client, sgd: Any) -> None:
    """Another process with a checkpoint: its parameters may be newer or older than the session's."""
    params = {"w": jnp.zeros(3)}
    params, state = sgd.step(params, ONES, sgd.init(params))
    sgd.session(state).detach()
    sessions._tracked.pop(sgd.session(state).session_id)
    params, state = sgd.step({"w": jnp.full(3, 10.0)}, ONES, state)
    assert params["w"].tolist() == [9.0] * 3
    resumed, state = sgd.resume(sgd.session(state).session_id, {"w": jnp.zeros(3)})
    assert resumed["w"].tolist() == [9.0] * 3
    assert sgd.step(resumed, ONES, state)[0]["w"].tolist() == [8.0] * 3


def test_several_servers_follow(target: str) -> None:
    params: Any = {"w": jnp.linspace(-1, 1, 200_000), "b": jnp.ones(3)}
    tx = stepwire.optax.sgd(1.0, server=[target, target])
    state = tx.init(params)
    params, state = tx.step(params, jax.tree.map(jnp.zeros_like, params), state)
    params["w"] = params["w"].at[199_999].set(5.0).at[0].set(-5.0)
    params, state = tx.step(params, jax.tree.map(jnp.ones_like, params), state)
    assert [float(params["w"][0]), float(params["w"][199_999])] == [-6.0, 4.0]
    assert params["b"].tolist() == [0.0] * 3
    tx.close(state)
