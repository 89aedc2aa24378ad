"""SGD and Lion against the equations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import SGD, Lion
from stepwire_server.rules.momentum import SGD as PLAIN
from stepwire_server.rules.momentum import SGD_MOMENTUM

Arrays = dict[str, np.ndarray]


def sgd(o: SGD, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    if not o.momentum:
        return {"param": old["param"] - o.lr * g}
    b = g if t == 1 else o.momentum * old["momentum_buffer"] + (1 - o.dampening) * g
    step = g + o.momentum * b if o.nesterov else b
    return {"param": old["param"] - o.lr * step, "momentum_buffer": b}


def lion(o: Lion, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    beta1, beta2 = o.betas
    direction = np.sign(beta1 * old["exp_avg"] + (1 - beta1) * g)
    return {
        "param": old["param"] - o.lr * direction,
        "exp_avg": beta2 * old["exp_avg"] + (1 - beta2) * g,
    }


KINDS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5, "dampening": 0.3},
    {"momentum": 0.5, "dampening": 1.0},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sgd_follows_the_equations(kind, check_equations) -> None:
    for decay, maximize in itertools.product([0.0, 0.3], [False, True]):
        check_equations(SGD(lr=0.01, weight_decay=decay, maximize=maximize, **kind), sgd)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.0)])
def test_lion_follows_the_equations(betas, check_equations) -> None:
    for decay, maximize in itertools.product([0.0, 0.3], [False, True]):
        check_equations(Lion(lr=0.01, betas=betas, weight_decay=decay, maximize=maximize), lion)


# --- by hand --------------------------------------------------------------------------------------------------


def test_two_steps_of_sgd_by_hand(run) -> None:
    grads = [np.array([4.0]), np.array([2.0])]
    assert [state["param"][0] for state in run(SGD(lr=0.5), np.ones(1), grads)] == [-1.0, -2.0]
    damped = run(SGD(lr=0.5, momentum=0.5, dampening=0.25), np.ones(1), grads)
    assert [state["momentum_buffer"][0] for state in damped] == [4.0, 3.5], "the first gradient is not dampened"
    assert [state["param"][0] for state in damped] == [-1.0, -2.75]
    ahead = run(SGD(lr=0.5, momentum=0.5, nesterov=True), np.ones(1), grads)
    assert [state["param"][0] for state in ahead] == [1 - 0.5 * 6, -2 - 0.5 * (2 + 0.5 * 4)]


def test_only_the_first_use_of_a_buffer_is_not_dampened() -> None:
    hyper, still = (SGD(**numbers).hyperparameters() for numbers in ({"momentum": 0.5, "dampening": 0.25}, {}))
    assert [SGD_MOMENTUM.scalars(hyper, t)[1] for t in (1, 2, 1000)] == [1.0, 0.75, 0.75]
    assert [SGD_MOMENTUM.scalars(hyper, 7, begun)[1] for begun in (0.0, 1.0)] == [1.0, 0.75]
    assert PLAIN.slots == ()
    begun = SGD_MOMENTUM.tensor_scalar
    assert begun is not None and PLAIN.tensor_scalar is None
    assert [begun.derived(numbers, t) for numbers in (hyper, still) for t in (0, 9)] == [0.0, 1.0, 0.0, 0.0]
    assert begun.following(hyper, 7, 0.0) == begun.following(hyper, 8, 1.0) == 1.0


def test_first_step_of_lion_by_hand(run) -> None:
    (state,) = run(Lion(lr=0.25, weight_decay=0.5), np.ones(3), [np.array([4.0, -1e-30, 0.0])])
    assert state["param"].tolist() == [0.875 - 0.25, 0.875 + 0.25, 0.875], "the sign of zero is zero"
    assert state["exp_avg"][0] == pytest.approx(0.04)
