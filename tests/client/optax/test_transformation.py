"""Transformations inside and outside of `jit`, beside optax's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
from stepwire.errors import InvalidRequestError, SessionNotFoundError  # noqa: E402


def parameters(seed: int = 0, dtype: Any = jnp.float32) -> Any:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return jnp.asarray(generator.standard_normal(shape), dtype)

    return {"encoder": [{"w": draw(4, 3), "b": draw(3)}, {"w": draw(3, 2)}], "head": (draw(2), draw())}


def loss(params: Any, batch: Any) -> Any:
    encoder, (scale, shift) = params["encoder"], params["head"]
    hidden = jnp.tanh(batch @ encoder[0]["w"] + encoder[0]["b"])
    return jnp.mean((hidden @ encoder[1]["w"] * scale + shift) ** 2)


def batches(count: int) -> Any:
    return jnp.asarray(np.random.default_rng(7).standard_normal((count, 8, 4)), jnp.float32)


def trained(tx: Any, params: Any, steps: int) -> tuple[list[Any], Any]:
    """Train under `jit` as people do; returns the parameters after each step, and the last state."""

    @jax.jit
    def train(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for batch in batches(steps):
        params, state = train(params, state, batch)
        seen.append(params)
    return seen, state


def assert_close(got: Any, want: Any, steps: int, lr: float = 0.01) -> None:
    """Roundings of updates of about the learning rate: each step adds its own, and passes on those before it.

    Most are optax's, which computes 1 - beta**t in float32: at t = 1 that is off by 6e-5 of itself.
    """
    atol = (3e-7 + 8e-8 * steps) * max(1.0, lr / 0.01)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=atol)


@pytest.fixture
def used(target: str) -> Iterator[dict[str, Any]]:
    """Options for a transformation, whose sessions end with the client."""
    with stepwire.connect(target, timeout=120.0) as client:
        yield {"server": client}


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, 120, 0.001)
CASES = {
    "adam": (stepwire.optax.adam, optax.adam, {"learning_rate": 0.01}),
    "adamw": (stepwire.optax.adamw, optax.adamw, {"learning_rate": 0.01, "weight_decay": 0.1}),
    "adam with a schedule": (stepwire.optax.adam, optax.adam, {"learning_rate": SCHEDULE}),
    "adamw with a schedule and a mask": (
        stepwire.optax.adamw,
        optax.adamw,
        {
            "learning_rate": SCHEDULE,
            "weight_decay": 0.3,
            "mask": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_optax(used: dict[str, Any], name: str) -> None:
    """120 steps under `jit` on a nested tree, compared after each."""
    make, peer, arguments = CASES[name]
    ours, state = trained(make(**arguments, **used), parameters(), 120)
    theirs, _ = trained(peer(**arguments), parameters(), 120)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert_close(one, other, step)
    assert int(state.count) == 120
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours[-1], parameters())
    assert min(jax.tree.leaves(moved)) > 0.01


LOOPS: dict[str, Any] = {
    "scan": lambda body, carry, grads: jax.jit(
        lambda carry: jax.lax.scan(lambda carry, each: (body(carry, each), None), carry, grads)[0]
    )(carry),
    "fori_loop": lambda body, carry, grads: jax.jit(
        lambda carry: jax.lax.fori_loop(0, 6, lambda i, carry: body(carry, jax.tree.map(lambda g: g[i], grads)), carry)
    )(carry),
    "while_loop and cond": lambda body, carry, grads: jax.jit(
        lambda carry: jax.lax.while_loop(
            lambda carry: carry[1].count < 6,
            lambda carry: jax.lax.cond(
                carry[1].count >= 0,
                lambda carry: body(carry, jax.tree.map(lambda g: g[carry[1].count], grads)),
                lambda carry: carry,
                carry,
            ),
            carry,
        )
    )(carry),
    "jit": lambda body, carry, grads: functools.reduce(
        jax.jit(body), [jax.tree.map(lambda g, i=i: g[i], grads) for i in range(6)], carry
    ),
    "nothing": lambda body, carry, grads: functools.reduce(
        body, [jax.tree.map(lambda g, i=i: g[i], grads) for i in range(6)], carry
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_in_and_out_of_jit_and_loops_the_bits_are_the_same(used: dict[str, Any], name: str) -> None:
    """The parameters of a session that is stepped with the same gradients in NumPy."""
    tx = stepwire.optax.adam(0.05, **used)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parameters(seed) for seed in range(1, 7)))
    params, state = LOOPS[name](
        lambda carry, each: tx.step(carry[0], each, carry[1]), (parameters(), tx.init(parameters())), grads
    )
    assert int(state.count) == tx.session(state).applied_step == 6
    plain = {"optimizer": stepwire.Adam(lr=0.05, formula="optax")}
    with used["server"].create_session(parameters(), **plain) as session:
        for seed in range(1, 7):
            want = session.step(parameters(seed))
    assert [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(params))] == [
        leaf.tobytes() for leaf in jax.tree.leaves(want)
    ]


def test_updates_give_the_servers_parameters(used: dict[str, Any]) -> None:
    """Exactly where the difference is exact, and else within a rounding of the difference."""
    tx = stepwire.optax.adam(0.01, **used)
    params = parameters()
    state = tx.init(params)
    grads = jax.grad(loss)(params, batches(1)[0])
    updates, state = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    server = tx.session(state).pull()
    for got, old, name in zip(jax.tree.leaves(after), jax.tree.leaves(params), server, strict=True):
        new = server[name]  # type: ignore[call-overload]
        exact = (np.asarray(old) / 2 <= new) & (new <= np.asarray(old) * 2)
        assert (np.asarray(got) == new)[exact].all()
        assert (np.abs(np.asarray(got) - new) <= 2.0**-23 * np.abs(np.float64(new) - np.float64(old))).all()


@pytest.mark.parametrize("jitted", [False, True])
def test_a_step_gives_the_servers_parameters_to_the_bit(used: dict[str, Any], jitted: bool) -> None:
    tx = stepwire.optax.adamw(0.01, **used)
    params = parameters()
    state = tx.init(params)
    step = jax.jit(tx.step) if jitted else tx.step
    for batch in batches(3):
        params, state = step(params, jax.grad(loss)(params, batch), state)
    server: Any = tx.session(state).pull()
    assert list(server) == ["encoder/0/b", "encoder/0/w", "encoder/1/w", "head/0", "head/1"]
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)] == [
        array.tobytes() for array in server.values()
    ]
    result = tx.session(state).last_result
    assert result is not None
    assert result.step == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_have_float32_masters(used: dict[str, Any], dtype: Any) -> None:
    """Steps too small for the parameters' own dtype add up on the server."""
    tx = stepwire.optax.sgd(2.0**-13, **used)
    params = {"w": jnp.ones(4, dtype)}
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update({"w": jnp.ones(4, dtype)}, state, params))
    for _ in range(64):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        assert params["w"].dtype == dtype
    assert params["w"].tolist() == [1.0 - 64 * 2.0**-13] * 4
    masters: Any = tx.session(state).pull()
    assert masters["w"].tolist() == [1.0 - 64 * 2.0**-13] * 4


def test_mixed_precisions_travel_in_float32(used: dict[str, Any]) -> None:
    tx = stepwire.optax.sgd(0.5, **used)
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(2, 1 + 2.0**-20, jnp.float32)}
    params, state = tx.step(params, jax.tree.map(jnp.ones_like, params), tx.init(params))
    assert params["a"].dtype == jnp.bfloat16
    assert params["a"].tolist() == [0.5, 0.5]
    assert params["b"].tolist() == [0.5 + 2.0**-20] * 2


def test_tensors_and_groups_have_precisions_of_their_own(used: dict[str, Any]) -> None:
    tx = stepwire.optax.adam(
        0.1,
        state_precision="int8",
        tensor_precision={"embedding": "float32"},
        groups=[{"params": ["head"], "state_precision": "bfloat16"}],
        **used,
    )
    params = {"embedding": jnp.ones(3), "head": {"w": jnp.ones(4), "b": jnp.ones(2)}, "hidden": jnp.ones(5)}
    assert tx.session(tx.init(params)).config.tensor_precision == {
        "embedding": "float32",
        "head/b": "bfloat16",
        "head/w": "bfloat16",
        "hidden": "int8",
    }


def test_init_works_where_it_is_traced(used: dict[str, Any]) -> None:
    """Also as checkpoint libraries use it: the shapes of a state, without a session."""
    tx = stepwire.optax.adam(0.1, **used)
    client = used["server"]
    before = sum(1 for _ in client.sessions())
    shapes = jax.eval_shape(tx.init, parameters())
    assert sum(1 for _ in client.sessions()) == before
    state = jax.jit(tx.init)(parameters())
    assert sum(1 for _ in client.sessions()) == before + 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    params, state = jax.jit(tx.step)(parameters(), parameters(1), state)
    assert int(state.count) == 1
    tx.close(state)


def test_a_program_that_traces_constants_alone_steps_each_time_it_runs(used: dict[str, Any]) -> None:
    tx = stepwire.optax.sgd(1.0, **used)
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    run = jax.jit(lambda: tx.step(params, {"w": jnp.ones(2)}, state))
    jax.make_jaxpr(lambda: tx.step(params, {"w": jnp.ones(2)}, state))()
    assert tx.session(state).applied_step == 0
    assert run()[0]["w"].tolist() == [-1.0, -1.0]


def test_transformations_combine(used: dict[str, Any]) -> None:
    """As the last of a chain; for a subtree; several sessions for several subtrees; every second step."""
    params, data = parameters(), batches(8)

    def outcome(tx: Any) -> Any:
        return trained(tx, params, len(data))[0][-1]

    assert_close(
        outcome(optax.chain(optax.clip_by_global_norm(0.1), stepwire.optax.adam(0.05, **used))),
        outcome(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))),
        8,
        0.05,
    )
    assert_close(
        outcome(stepwire.optax.adam(0.05, clip_grad_norm=0.1, **used)),
        outcome(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))),
        8,
        0.05,
    )
    labels = {"encoder": "a", "head": "b"}
    assert_close(
        outcome(
            optax.partition({"a": stepwire.optax.adam(0.05, **used), "b": stepwire.optax.sgd(0.5, **used)}, labels)
        ),
        outcome(optax.partition({"a": optax.adam(0.05), "b": optax.sgd(0.5)}, labels)),
        8,
        0.05,
    )
    assert_close(
        outcome(optax.chain(optax.scale(0.5), stepwire.optax.adam(0.05, accumulation_steps=2, **used))),
        outcome(optax.MultiSteps(optax.adam(0.05), 2)),
        8,
        0.05,
    )


def test_a_wrapper_that_throws_updates_away_is_told(used: dict[str, Any]) -> None:
    """`optax.MultiSteps` updates each time and keeps every second state: the steps between cannot be undone."""
    tx = optax.MultiSteps(stepwire.optax.adam(0.05, **used), 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="one state was used for two updates"):
        trained(tx, parameters(), 3)


def test_a_learning_rate_may_be_injected(used: dict[str, Any]) -> None:
    ours = optax.inject_hyperparams(lambda learning_rate: stepwire.optax.adam(learning_rate, **used))
    theirs = optax.inject_hyperparams(lambda learning_rate: optax.adam(learning_rate))
    got, state = trained(ours(learning_rate=SCHEDULE), parameters(), 8)
    assert_close(got[-1], trained(theirs(learning_rate=SCHEDULE), parameters(), 8)[0][-1], 8)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    with pytest.raises(InvalidRequestError, match="b1: is a scalar of JAX's, .* a function of learning_rate alone"):
        stepwire.optax.adam(0.1, b1=jnp.asarray(0.9), **used)


@pytest.mark.parametrize("rate", [float("nan"), -1.0])
def test_a_schedule_that_goes_wrong_is_told(used: dict[str, Any], rate: float) -> None:
    tx = stepwire.optax.adam(lambda count: jnp.where(count < 1, 0.1, rate), **used)
    params = {"w": jnp.ones(2)}
    params, state = tx.step(params, params, tx.init(params))
    with pytest.raises(InvalidRequestError, match="lr is"):
        tx.step(params, params, state)
    assert tx.session(state).applied_step == 1


def test_a_program_goes_on_where_its_session_is(target: str) -> None:
    """As after a restart: another client, which knows the id alone, and parameters that are out of date."""
    tx = stepwire.optax.adam(0.05, server=target)
    params, state, data = parameters(), tx.init(parameters()), batches(6)
    for batch in data[:3]:
        params, state = tx.step(params, jax.grad(loss)(params, batch), state)
    session_id = tx.session(state).session_id
    with stepwire.connect(target) as client:
        other = stepwire.optax.adam(0.05, server=client)
        resumed, again = other.resume(session_id, parameters())
        assert int(again.count) == 3
        assert [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(resumed))] == [
            leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(params))
        ]
        for batch in data[3:]:
            resumed, again = jax.jit(other.step)(resumed, jax.grad(loss)(resumed, batch), again)
        want = trained(optax.adam(0.05), parameters(), 6)[0][-1]
        assert_close(resumed, want, 6, 0.05)
        with pytest.raises(InvalidRequestError, match="params: the session has the tensors"):
            other.resume(session_id, {"w": jnp.ones(2)})
        other.close(again)
        other.close(again)
        with pytest.raises(InvalidRequestError, match="this process has no session"):
            other.session(again)
        with pytest.raises(SessionNotFoundError):
            other.step(resumed, resumed, again)


def test_several_servers_have_one_model(target: str) -> None:
    params = {"w": jnp.linspace(-1, 1, 200_000), "b": jnp.ones(3)}
    tx = stepwire.optax.adamw(0.01, server=[target, target])
    one = stepwire.optax.adamw(0.01, server=target)
    state, alone = tx.init(params), one.init(params)
    step = jax.jit(tx.step)
    cut, whole = step(params, params, state), one.step(params, params, alone)
    assert "," in tx.session(state).session_id
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cut[0])] == [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole[0])
    ]
    tx.close(state)
    one.close(alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": None}, r"params: updates are differences from them; call update\(grads, state, params\)"),
        ({"grads": {"v": jnp.ones(2)}}, "grads: their tree is"),
        ({"grads": {"w": jnp.ones(3)}}, r"gradients\['w'\]: shape \(3,\) is not the session's \(2,\)"),
        ({"grads": {"w": jnp.ones(2, jnp.int32)}}, r"grads\['w'\]: dtype int32 is not served"),
    ],
)
def test_what_does_not_fit_is_refused(used: dict[str, Any], change: dict[str, Any], message: str) -> None:
    tx = stepwire.optax.adam(0.1, **used)
    params = {"w": jnp.ones(2)}
    arguments = {"grads": params, "state": tx.init(params), "params": params, **change}
    with pytest.raises(InvalidRequestError, match=message):
        tx.update(*(arguments[name] for name in ("grads", "state", "params")))


def test_an_error_of_the_server_comes_out_of_jit(used: dict[str, Any]) -> None:
    """And leaves the program as it was: the step after it works."""
    tx = stepwire.optax.adam(0.1, **used)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    step = jax.jit(tx.step)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteGradientError"):
        jax.block_until_ready(step(params, {"w": jnp.full(2, jnp.nan)}, state))
    params, state = step(params, {"w": jnp.ones(2)}, state)
    assert params["w"].tolist() == pytest.approx([0.9, 0.9])
