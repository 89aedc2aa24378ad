"""Decay far below the rounding of a parameter, over thousands of updates, against the frameworks' own numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from conformance.judging import parameter_misses
from conformance.stored_case import StoredCase, stored_cases
from stepwire.optimizers.schedules import schedule_from_wire
from stepwire.wire.messages import optimizer_from_wire
from stepwire_server.rules import Decay, Recipe, rule_for
from stepwire_server.rules.schedules import factor

CASES = {case.name: case for case in stored_cases() if case.family == "decay"}


def share(case: StoredCase, strength: float = 1.0) -> float:
    """Return the largest error of the float32 arithmetic as a fraction of its bound; `strength` scales the decay."""
    optimizer, name = optimizer_from_wire(case.config.optimizer, "optimizer"), "weight"
    hyper, (rule, decay) = optimizer.hyperparameters(), rule_for(optimizer, False)
    recipe = Recipe(rule, decay if hyper.weight_decay else Decay.NONE, forgotten=rule.forgotten(hyper))
    schedule = schedule_from_wire(case.config.groups[0].schedule, "schedule") if case.config.groups else None
    values: dict[str, Any] = {variable: np.zeros_like(case.initial[name]) for variable in recipe.slots.values()}
    values["p"], shares = case.initial[name], []
    for t in range(1, case.checkpoints[-1] + 1):
        now = hyper if schedule is None else dataclasses.replace(hyper, lr=hyper.lr * factor(schedule, t - 1))
        scalars = [1.0, 1.0] + ([] if recipe.decay is Decay.NONE else [strength * recipe.decay.scalar(now)])
        values["g"] = case.gradients[name][(t - 1) % 20] * np.float32(case.special(t).factor)
        scalars += rule.scalars(now, t)
        values |= dict(zip(recipe.scalars, map(np.float32, scalars), strict=True))
        values = recipe.evaluate(recipe.stages, values)
        if t in case.checkpoints:
            one = dataclasses.replace(case, expected={"param": {name: case.expected["param"][name]}})
            misses = parameter_misses(one, case.checkpoints.index(t), {name: values["p"]})
            shares.append(max(miss.fraction for miss in misses))
    return max(shares)


@pytest.mark.parametrize("name", CASES)
def test_decay_is_that_of_the_framework(name: str) -> None:
    assert share(CASES[name]) <= 1


@pytest.mark.parametrize("strength", [0.0, 1.5])
@pytest.mark.parametrize("name", ["decay-adamw-optax", "decay-adamw-optax-slow"])
def test_no_decay_and_half_as_much_again_miss(name: str, strength: float) -> None:
    """Torch's form gives one or the other at these numbers, which are optax's defaults."""
    assert share(CASES[name], strength) > 2
