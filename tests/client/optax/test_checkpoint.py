"""The state of a session as arrays, and a session from arrays."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
import stepwire_server.testing  # noqa: E402
from stepwire.errors import InvalidRequestError, SessionNotFoundError, StepMismatchError  # noqa: E402
from stepwire.optax import sessions  # noqa: E402
from stepwire.optax.checkpoint import arrays_of, snapshot_of  # noqa: E402
from stepwire.results import Snapshot  # noqa: E402


def draw(seed: int, dtype: Any = jnp.float32) -> Any:
    generator = np.random.default_rng(seed)
    return {
        "encoder": [{"w": jnp.asarray(generator.standard_normal((3, 2)), dtype)}],
        "mlp/~/linear.0": {"b": jnp.asarray(generator.standard_normal(2), dtype)},
    }


def trained(tx: Any, params: Any, state: Any, seeds: range, dtype: Any = jnp.float32) -> Any:
    step = jax.jit(tx.step)
    for seed in seeds:
        params, state = step(params, draw(seed, dtype), state)
    return params, state


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def through_a_file(arrays: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return dict(np.load(file))


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "numpy.savez": through_a_file,
    "arrays of JAX's, with int32 for int64": lambda arrays: jax.tree.map(jnp.asarray, arrays),
    "another order": lambda arrays: dict(reversed(arrays.items())),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_program_goes_on_from_its_arrays_on_another_server(client: stepwire.Client, way: str) -> None:
    """To the bit, with the schedule and the bias corrections of the step after."""
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    options = {"learning_rate": schedule, "weight_decay": 0.1}
    tx = stepwire.optax.adamw(**options, server=client)
    params, state = trained(tx, draw(0), tx.init(draw(0)), range(1, 5))
    saved, arrays = params, WAYS[way](tx.to_arrays(state))
    want, _ = trained(tx, params, state, range(5, 9))
    with stepwire_server.testing.serving(threads=1) as other, stepwire.connect(other, timeout=120.0) as second:
        again = stepwire.optax.adamw(**options, server=second)
        restored = again.from_arrays(arrays, saved)
        assert int(restored.count) == 4
        got, after = trained(again, saved, restored, range(5, 9))
        assert int(after.count) == again.session(after).applied_step == 8
    assert bits(got) == bits(want)


def test_the_form_of_the_arrays(client: stepwire.Client) -> None:
    tx = stepwire.optax.adam(0.1, server=client)
    _, state = trained(tx, draw(0), tx.init(draw(0)), range(1, 3))
    arrays = tx.to_arrays(state)
    names = ("encoder/0/w", "mlp/~/linear.0/b")
    slots = [f"{slot}/{name}" for slot in ("param", "exp_avg", "exp_avg_sq") for name in names]
    assert sorted(arrays) == sorted(["count", "tensor_steps", *slots])
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert (int(arrays["count"]), arrays["tensor_steps"].tolist()) == (2, [2, 2])
    held: Any = tx.session(state).state()
    assert arrays["exp_avg/encoder/0/w"].tolist() == held.slots["exp_avg"]["encoder/0/w"].tolist()


def test_an_older_checkpoint_while_its_session_went_on(client: stepwire.Client) -> None:
    tx = stepwire.optax.adam(0.1, server=client)
    early, state = trained(tx, draw(0), tx.init(draw(0)), range(1, 3))
    arrays = tx.to_arrays(state)
    want, last = trained(tx, early, state, range(3, 6))
    with pytest.raises(StepMismatchError, match=r"the state is an old one\. .*tx\.from_arrays\(arrays, params\)"):
        tx.step(early, draw(3), state)
    got, _ = trained(tx, early, tx.from_arrays(arrays, early), range(3, 6))
    assert bits(got) == bits(want)
    with pytest.raises(StepMismatchError, match="is at step 2, .* is at step 5: the state is an old one"):
        tx.to_arrays(state)
    assert int(tx.to_arrays(last)["count"]) == 5


def test_half_precision_keeps_its_masters(client: stepwire.Client) -> None:
    """And where the program's parameters are others than the checkpoint's, they win."""
    tx = stepwire.optax.sgd(2.0**-13, server=client)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    ones = {"w": jnp.ones(3, jnp.bfloat16)}
    params, state = tx.step(params, ones, tx.init(params))
    arrays = tx.to_arrays(state)
    restored = tx.from_arrays(arrays, {"w": params["w"].at[0].set(2.0)})
    held: Any = tx.session(restored).pull()
    assert held["w"].tolist() == [2.0, 1 - 2.0**-13, 1 - 2.0**-13]


@pytest.mark.parametrize("state_precision", ["bfloat16", "int8"])
def test_moments_of_fewer_bits(client: stepwire.Client, state_precision: Any) -> None:
    tx = stepwire.optax.adam(0.1, state_precision=state_precision, server=client)
    params = {"w": jnp.linspace(-1, 1, 5000)}
    state = tx.init(params)
    for _ in range(3):
        params, state = tx.step(params, params, state)
    arrays = tx.to_arrays(state)
    again = tx.to_arrays(tx.from_arrays(arrays, params))
    assert arrays.keys() == again.keys()
    assert all(arrays[key].tobytes() == again[key].tobytes() for key in arrays)


def test_a_lost_session_is_told_with_the_way_back(client: stepwire.Client) -> None:
    tx = stepwire.optax.adam(0.1, server=client)
    params, state = trained(tx, draw(0), tx.init(draw(0)), range(1, 3))
    session = tx.session(state)
    session.close()
    sessions.forget(session.session_id)
    with pytest.raises(SessionNotFoundError, match=r"state = tx\.from_arrays\(arrays, params\)"):
        tx.step(params, draw(3), state)


def test_no_session_is_left_of_arrays_that_do_not_fit(client: stepwire.Client) -> None:
    tx = stepwire.optax.sgd(0.1, momentum=0.9, server=client)
    params, state = trained(tx, draw(0), tx.init(draw(0)), range(1, 3))
    arrays = tx.to_arrays(state)
    before = sum(1 for _ in client.sessions())
    with pytest.raises(InvalidRequestError, match=r"state\.slots: has .*momentum_buffer.*, the session has .*exp_avg"):
        stepwire.optax.adam(0.1, server=client).from_arrays(arrays, params)
    assert sum(1 for _ in client.sessions()) == before


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another dict": (lambda arrays: {"w": np.ones(2)}, "arrays: there is no 'count' .* that tx.to_arrays returned"),
    "no dict": (lambda arrays: list(arrays.values()), "arrays: there is no 'count'"),
    "a tensor less": (
        lambda arrays: {key: array for key, array in arrays.items() if "mlp" not in key},
        r"arrays: tensor 'mlp/~/linear.0/b' has the shape None in them, and \(2,\) among the parameters",
    ),
    "a tensor more": (lambda arrays: arrays | {"param/x": np.ones(2)}, "tensor 'x' has the shape"),
    "another shape": (
        lambda arrays: arrays | {"param/encoder/0/w": np.ones((2, 3), np.float32)},
        r"tensor 'encoder/0/w' has the shape \(2, 3\)",
    ),
    "a slot in another shape": (
        lambda arrays: arrays | {"exp_avg/encoder/0/w": np.ones((2, 3), np.float32)},
        r"state\.slots\['exp_avg'\]\['encoder/0/w'\]: shape",
    ),
    "counts of other tensors": (lambda arrays: arrays | {"tensor_steps": np.ones(3, np.int64)}, "there are 2 tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_refused(client: stepwire.Client, name: str) -> None:
    change, message = WRONG[name]
    tx = stepwire.optax.adam(0.1, server=client)
    arrays = tx.to_arrays(tx.init(draw(0)))
    with pytest.raises(InvalidRequestError, match=message):
        tx.from_arrays(change(arrays), draw(0))


def test_traced_values_are_refused(client: stepwire.Client) -> None:
    tx = stepwire.optax.adam(0.1, server=client)
    state = tx.init(draw(0))
    arrays = tx.to_arrays(state)
    with pytest.raises(InvalidRequestError, match=r"state: is traced; .* outside of jax\.jit"):
        jax.jit(tx.to_arrays)(state)
    with pytest.raises(InvalidRequestError, match="arrays: is traced"):
        jax.jit(tx.from_arrays)(arrays, draw(0))


def test_a_loss_scale_is_part_of_the_arrays() -> None:
    state = Snapshot(3, {"param": {"a/b": np.ones(2, np.float32)}}, {"a/b": 3}, (1024.0, 7))
    again = snapshot_of(arrays_of(state), {"a/b": (2,)})
    assert (again.step, again.tensor_steps, again.loss_scale) == (3, {"a/b": 3}, (1024.0, 7))
