"""The transformations of JAX that a step refuses, and the words of the refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
from stepwire.errors import UnsupportedFeatureError  # noqa: E402

PARAMS = {"w": jnp.ones(2)}
BATCH = {"w": jnp.ones((3, 2))}

Update = Callable[[Any], Any]
VECTORISED: dict[str, Callable[[Update], Any]] = {
    "vmap": lambda update: jax.vmap(update)(BATCH),
    "vmap of jit": lambda update: jax.vmap(jax.jit(update))(BATCH),
    "jit of vmap": lambda update: jax.jit(jax.vmap(update))(BATCH),
    "vmap with a name": lambda update: jax.vmap(update, axis_name="batch")(BATCH),
    "vmap of a loop": lambda update: jax.vmap(
        lambda grads: jax.lax.fori_loop(0, 2, lambda _, grads: update(grads), grads)
    )(BATCH),
}
DIFFERENTIATED: dict[str, Callable[[Update], Any]] = {
    "grad": lambda update: jax.grad(lambda grads: update(grads)["w"].sum())(PARAMS),
    "jit of grad": lambda update: jax.jit(jax.grad(lambda grads: update(grads)["w"].sum()))(PARAMS),
    "jvp": lambda update: jax.jvp(update, (PARAMS,), (PARAMS,)),
    "a checkpoint": lambda update: jax.grad(jax.checkpoint(lambda grads: update(grads)["w"].sum()))(PARAMS),
}


@pytest.fixture
def update(client: stepwire.Client) -> Update:
    tx = stepwire.optax.adam(0.1, server=client)
    state = tx.init(PARAMS)
    return lambda grads: tx.update(grads, state, PARAMS)[0]


@pytest.mark.parametrize("name", VECTORISED)
def test_vmap_is_refused(update: Update, name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="inside of vmap: .* Average the gradients") as refused:
        VECTORISED[name](update)
    assert refused.value.metadata["feature"] == "vmap"


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_grad_is_refused(update: Update, name: str) -> None:
    with pytest.raises(
        UnsupportedFeatureError, match=r"inside of grad: .* Apply jax.grad to the loss alone"
    ) as refused:
        DIFFERENTIATED[name](update)
    assert refused.value.metadata["feature"] == "grad"


def test_gradients_that_are_stopped_are_not_differentiated(update: Update) -> None:
    def value(grads: Any) -> Any:
        return update(jax.lax.stop_gradient(grads))["w"].sum() + (grads["w"] ** 2).sum()

    assert jax.grad(value)(PARAMS)["w"].tolist() == [2.0, 2.0]


def test_pmap_and_shard_map_are_refused(update: Update) -> None:
    with pytest.raises(UnsupportedFeatureError, match="inside of pmap: each device would send the step. Average"):
        jax.pmap(update)({"w": jnp.ones((1, 2))})
    mesh = jax.make_mesh((1,), ("x",))
    mapped = jax.shard_map(update, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(UnsupportedFeatureError, match="inside of pmap"):
        jax.jit(mapped)(PARAMS)


def test_arrays_may_be_sharded_over_devices_under_jit(target: str) -> None:
    """In a process of its own, since the number of devices is fixed when JAX starts. One step, not one a device."""
    code = (
        "import os, json, sys\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'\n"
        "import jax, jax.numpy as jnp, stepwire.optax\n"
        "mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "place = jax.sharding.NamedSharding(mesh, jax.P('x'))\n"
        "params = {'w': jax.device_put(jnp.zeros(4), place)}\n"
        "tx = stepwire.optax.sgd(0.5, server=sys.argv[1])\n"
        "params, state = jax.jit(tx.step)(params, {'w': jax.device_put(jnp.arange(4.0), place)}, tx.init(params))\n"
        "print(json.dumps([jax.device_count(), tx.session(state).info().applied_step, params['w'].tolist()]))\n"
        "tx.close(state)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, 1, [0.0, -0.5, -1.0, -1.5]]


def test_a_program_of_several_processes_is_refused(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UnsupportedFeatureError, match="this program has 2 processes, .* Gather the gradients in one"):
        stepwire.optax.adam(0.1, server=client).init(PARAMS)
