"""Constructors beside those of optax that have their names: the same numbers, or a refusal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
from stepwire.errors import InvalidRequestError, StepwireError, UnsupportedFeatureError  # noqa: E402

NAMES = [
    name for name in stepwire.optax.__all__ if name != "remote" and inspect.isfunction(getattr(stepwire.optax, name))
]
VERSION = "0.2.8"
SCHEDULE = optax.linear_schedule(0.03, 0.003, 20)
MASK = {"w": [True, False], "s": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {}),
    "adam, eps_root, Nesterov": ("adam", {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "eps_root": 1e-4, "nesterov": True}),
    "nadam": ("nadam", {"learning_rate": SCHEDULE}),
    "adamw": ("adamw", {"weight_decay": 0.2, "mask": MASK}),
    "adamw, prefix of a mask": ("adamw", {"weight_decay": 0.2, "mask": {"w": False, "s": True}}),
    "nadamw": ("nadamw", {"weight_decay": 0.1}),
    "amsgrad": ("amsgrad", {"b2": 0.8}),
    "adamax": ("adamax", {"b2": 0.9}),
    "sgd": ("sgd", {"learning_rate": SCHEDULE}),
    "sgd, momentum": ("sgd", {"learning_rate": SCHEDULE, "momentum": 0.9}),
    "sgd, Nesterov": ("sgd", {"momentum": 0.8, "nesterov": True}),
    "sgd, Nesterov without momentum": ("sgd", {"nesterov": True}),
    "lion": ("lion", {"weight_decay": 0.1, "mask": MASK}),
    "rmsprop": ("rmsprop", {"eps_in_sqrt": False, "learning_rate": SCHEDULE}),
    "rmsprop, centered, momentum": (
        "rmsprop",
        {"eps_in_sqrt": False, "centered": True, "momentum": 0.7, "eps": 1e-3},
    ),
    "adadelta": ("adadelta", {"learning_rate": 1.0, "weight_decay": 0.1, "weight_decay_mask": MASK}),
    "lamb": ("lamb", {"weight_decay": 0.1, "mask": MASK, "learning_rate": SCHEDULE}),
    "lars": ("lars", {"weight_decay": 0.1, "weight_decay_mask": MASK, "learning_rate": SCHEDULE}),
    "lars, Nesterov": ("lars", {"nesterov": True, "trust_coefficient": 0.01, "eps": 1e-3}),
}


@pytest.fixture(scope="module")
def server(target: str) -> Iterator[stepwire.Client]:
    with stepwire.connect(target, timeout=120.0) as client:
        yield client


def draw(seed: int) -> Any:
    generator = np.random.default_rng(seed)
    w, v = generator.standard_normal((5, 4)), generator.standard_normal(6)
    return {"w": [jnp.float32(w), jnp.float32(v)], "s": jnp.float32(generator.standard_normal(2))}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_optax(server: stepwire.Client, name: str) -> None:
    """Twenty steps of gradients that do not depend on the parameters, so that no difference grows by itself."""
    function, arguments = CASES[name]
    arguments = {"learning_rate": 0.03} | arguments
    ours, theirs = getattr(stepwire.optax, function)(**arguments, server=server), getattr(optax, function)(**arguments)
    mine = yours = draw(0)
    one, other = ours.init(mine), theirs.init(yours)
    update = jax.jit(theirs.update)
    for step in range(1, 21):
        grads = draw(step)
        mine, one = ours.step(mine, grads, one)
        updates, other = update(grads, other, yours)
        yours = optax.apply_updates(yours, updates)
        for got, want in zip(jax.tree.leaves(mine), jax.tree.leaves(yours), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 + 2e-7 * step)
    ours.close(one)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_optax(name: str) -> None:
    """By name, kind, order and default, except for the options of the session."""
    if optax.__version__ != VERSION:
        pytest.skip(f"signatures are those of optax {VERSION}, and this is {optax.__version__}")
    ours = inspect.signature(getattr(stepwire.optax, name)).parameters
    peer = getattr(optax, name)
    theirs = inspect.signature(peer).parameters
    assert [(each.name, each.kind, each.default) for each in ours.values() if each.name != "options"] == [
        (each.name, each.kind, each.default) for each in theirs.values()
    ]


REFUSED: dict[str, tuple[Callable[[], Any], type[StepwireError], str]] = {
    "another dtype of moments": (
        lambda: stepwire.optax.adam(0.1, mu_dtype=jnp.bfloat16),
        UnsupportedFeatureError,
        "mu_dtype: is .*bfloat16.*; use state_precision='bfloat16'",
    ),
    "another dtype of an accumulator": (
        lambda: stepwire.optax.sgd(0.1, momentum=0.9, accumulator_dtype="float16"),
        UnsupportedFeatureError,
        "accumulator_dtype",
    ),
    "eps in the root": (
        lambda: stepwire.optax.rmsprop(0.1),
        UnsupportedFeatureError,
        "eps_in_sqrt: is True, and the server's RMSprop adds eps to the root, as torch's does; use eps_in_sqrt=False",
    ),
    "initial scale": (
        lambda: stepwire.optax.rmsprop(0.1, eps_in_sqrt=False, initial_scale=1.0),
        UnsupportedFeatureError,
        "initial_scale: is 1.0",
    ),
    "Nesterov RMSprop": (
        lambda: stepwire.optax.rmsprop(0.1, eps_in_sqrt=False, nesterov=True),
        UnsupportedFeatureError,
        "nesterov: is True",
    ),
    "corrected RMSprop": (
        lambda: stepwire.optax.rmsprop(0.1, eps_in_sqrt=False, bias_correction=True),
        UnsupportedFeatureError,
        "bias_correction: is True",
    ),
    "RMSprop's momentum with a schedule": (
        lambda: stepwire.optax.rmsprop(SCHEDULE, eps_in_sqrt=False, momentum=0.9),
        UnsupportedFeatureError,
        "momentum: optax's buffer contains the learning rates of all steps",
    ),
    "half-corrected AMSGrad": (
        lambda: stepwire.optax.amsgrad(0.1, bias_correction_mu=False),
        UnsupportedFeatureError,
        "bias_correction_mu: is False",
    ),
    "a mask of trust ratios": (
        lambda: stepwire.optax.lars(0.1, trust_ratio_mask={"w": False}),
        UnsupportedFeatureError,
        "trust_ratio_mask: is {'w': False}",
    ),
    "no learning rate": (
        lambda: stepwire.optax.adadelta(),
        InvalidRequestError,
        "learning_rate: is None, with which optax.adadelta ascends",
    ),
    "a schedule of the decay": (
        lambda: stepwire.optax.adamw(0.1, weight_decay=lambda count: 0.1),
        InvalidRequestError,
        "optimizer.weight_decay: .* is not a number",
    ),
    "a beta out of range": (lambda: stepwire.optax.adam(0.1, b1=1.0), InvalidRequestError, "beta1 is 1.0"),
    "a learning rate out of range": (lambda: stepwire.optax.adam(-0.1), InvalidRequestError, "lr is -0.1"),
    "an option that is none": (
        lambda: stepwire.optax.adam(0.1, serve="x"),  # type: ignore[call-arg]
        InvalidRequestError,
        "serve: there is no such option; use one of: server, transport",
    ),
    "groups beside a mask": (
        lambda: stepwire.optax.adamw(0.1, mask={"w": True}, groups=[]),
        InvalidRequestError,
        "groups: a mask makes the groups already",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_does_not_do_is_refused_by_name(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [({"w": True}, "mask: the mask does not fit"), ({"w": [1, 0], "s": True}, r"mask\['w/0'\]: 1 is not a bool")],
)
def test_a_mask_that_does_not_fit_is_refused(server: stepwire.Client, mask: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        stepwire.optax.adamw(0.1, mask=mask, server=server).init(draw(0))


def test_a_mask_of_nothing_and_of_everything_are_no_groups_and_one(server: stepwire.Client) -> None:
    for mask, norm in ((True, 0.5), (False, 1.0), (lambda params: jax.tree.map(lambda _: False, params), 1.0)):
        tx = stepwire.optax.adamw(1.0, b1=0.0, b2=0.0, weight_decay=0.5, mask=mask, server=server)
        params = {"w": jnp.ones(2), "v": jnp.ones(1)}
        stepped, state = tx.step(params, jax.tree.map(jnp.zeros_like, params), tx.init(params))
        assert stepped["w"].tolist() == [norm] * 2
        tx.close(state)


def test_rules_in_the_servers_own_form(server: stepwire.Client) -> None:
    tx = stepwire.optax.remote(stepwire.Adagrad(lr=0.5, eps=0.0), server=server)
    params, state = tx.step({"w": jnp.zeros(2)}, {"w": jnp.float32([3, -4])}, tx.init({"w": jnp.zeros(2)}))
    assert params["w"].tolist() == [-0.5, 0.5]
    tx = stepwire.optax.remote(stepwire.Adagrad(lr=0.5, eps=0.0), 0.25, server=server)
    params, state = tx.step({"w": jnp.zeros(2)}, {"w": jnp.float32([3, -4])}, tx.init({"w": jnp.zeros(2)}))
    assert params["w"].tolist() == [-0.25, 0.25]
