"""A session in small: runs an optimizer over one tensor, in the dtype of its arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import Optimizer
from stepwire_server.rules import Decay, Recipe, has_momentum, rule_for

SIZE = 23
LENGTHS = (1, 2, 10, 1000)
"""Numbers of steps to look at."""

Arrays = dict[str, np.ndarray]
Reference = Callable[[Any, int, np.ndarray, Arrays], Arrays]


def recipe_of(optimizer: Optimizer) -> Recipe:
    """Return the arithmetic of the optimizer's steps."""
    hyper = optimizer.hyperparameters()
    rule, decay = rule_for(optimizer, has_momentum([hyper]))
    return Recipe(rule, decay if hyper.weight_decay else Decay.NONE, forgotten=rule.forgotten(hyper))


def run(optimizer: Optimizer, start: np.ndarray, gradients: Sequence[np.ndarray]) -> list[Arrays]:
    """Return the parameters and slots after each step."""
    recipe, hyper = recipe_of(optimizer), optimizer.hyperparameters()
    number = start.dtype.type
    names = {"param": "p", **recipe.slots}
    values = {variable: np.zeros_like(start) for variable in names.values()} | {"p": start}
    if "sum" in names:
        values["s"] = np.full_like(start, optimizer.structure().initial_accumulator_value)
    states = []
    for t, gradient in enumerate(gradients, start=1):
        scalars = [-1.0 if hyper.maximize else 1.0, 1.0]
        scalars += [] if recipe.decay is Decay.NONE else [recipe.decay.scalar(hyper)]
        scalars += [*recipe.rule.scalars(hyper, t), *([1.0] if recipe.rule.trust else [])]
        values |= {"g": gradient} | dict(zip(recipe.scalars, map(number, scalars), strict=True))
        if recipe.rule.trust is not None:
            direction = recipe.evaluate(recipe.direction_stages, values)["u"]
            norms = (math.hypot(*values["p"].tolist()), math.hypot(*direction.tolist()))
            values |= zip(recipe.rule_scalars[-2:], map(number, recipe.rule.trust(hyper, *norms)), strict=True)
        values = recipe.evaluate(recipe.stages, values)
        states.append({slot: np.asarray(values[variable]) for slot, variable in names.items()})
    return states


def gradients(steps: int, seed: int = 7) -> np.ndarray:
    """Draw gradients that fall by a factor of 10 halfway, so that a running maximum shows; one element's are zero."""
    values = np.random.default_rng(seed).standard_normal((steps, SIZE))
    values[steps // 2 :] /= 10.0
    values[:, 3] = 0.0
    return values


@pytest.fixture(scope="session", name="recipe_of")
def _recipe_of() -> Callable[[Optimizer], Recipe]:
    return recipe_of


@pytest.fixture(scope="session", name="run")
def _run() -> Callable[..., list[Arrays]]:
    return run


@pytest.fixture(scope="session", name="gradients")
def _gradients() -> Callable[..., np.ndarray]:
    return gradients


def _place(optimizer: Any) -> str:
    """Say where decay acts, from what the optimizers' documentation says."""
    if optimizer.rule in ("lamb", "lars"):
        return "its own"
    if optimizer.rule == "lion":
        return "before"
    if not getattr(optimizer, "decoupled_weight_decay", False):
        return "gradient"
    return "after" if optimizer.structure().formula == "decay_after" else "before"


@pytest.fixture(scope="session")
def check_equations() -> Callable[..., None]:
    """Compare 1000 steps in float64 with `reference(optimizer, t, g, state) → state`.

    A reference sees the gradient with the sign of `maximize` and its L2 decay, and the parameters with decay that
    comes before; whatever else there is, is its own. A state is arrays by slot; the first is zeros besides `param`.
    """

    def check(optimizer: Any, reference: Reference) -> None:
        start, grads = np.random.default_rng(1).standard_normal(SIZE), gradients(max(LENGTHS))
        states = run(optimizer, start, grads)
        expected: Arrays = {slot: np.zeros(SIZE) for slot in states[0]} | {"param": start}
        for t, gradient in enumerate(grads, start=1):
            g = -gradient if optimizer.maximize else gradient
            p, decay = expected["param"], optimizer.weight_decay
            place = _place(optimizer)
            if place == "gradient":
                g = g + decay * p
            if place == "before":
                expected["param"] = p - optimizer.lr * decay * p
            expected = reference(optimizer, t, g, expected)
            if place == "after":
                expected["param"] = expected["param"] - optimizer.lr * decay * expected["param"]
            if t in LENGTHS:
                assert expected.keys() == states[t - 1].keys()
                for slot, value in states[t - 1].items():
                    np.testing.assert_allclose(
                        value, expected[slot], rtol=1e-11, atol=1e-13, err_msg=f"{slot} after {t} of {optimizer!r}"
                    )

    return check
