"""Adam in every form against the equations, written here once more with hats."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import Adam, AdamW
from stepwire_server.rules import Decay, rule_for
from stepwire_server.rules.adam import ADAM_RULES

pytestmark = pytest.mark.many

NUMBERS = [((0.9, 0.999), 1e-8, False), ((0.5, 0.9), 1e-3, True)]
DECAYS = [(0.0, False), (0.3, False), (0.3, True)]
KINDS: dict[str, list[dict[str, Any]]] = {
    "torch": [{}, {"amsgrad": True}],
    "keras": [{}, {"amsgrad": True}],
    "no_bias_correction": [{}, {"amsgrad": True}],
    "optax": [{}, {"eps_root": 1e-4}, {"amsgrad": "corrected", "eps_root": 1e-4}, {"nesterov": True}],
    "decay_after": [{}],
}


def optimizers(formula: str) -> list[Adam]:
    return [
        Adam(
            lr=0.01,
            betas=betas,
            eps=eps,
            weight_decay=decay,
            decoupled_weight_decay=decoupled,
            maximize=maximize,
            formula=formula,  # type: ignore[arg-type]
            **kind,
        )
        for kind, (betas, eps, maximize), (decay, decoupled) in itertools.product(KINDS[formula], NUMBERS, DECAYS)
        if decoupled or not decay or formula not in ("keras", "decay_after")
    ]


def expected(adam: Adam, t: int, g: np.ndarray, old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    beta1, beta2 = adam.betas
    new = {
        "exp_avg": beta1 * old["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    corrected = adam.formula != "no_bias_correction"
    m_hat = new["exp_avg"] / (1 - beta1**t) if corrected else new["exp_avg"]
    v_hat = new["exp_avg_sq"] / (1 - beta2**t) if corrected else new["exp_avg_sq"]
    if adam.amsgrad == "corrected":
        v_hat = new["max_exp_avg_sq"] = np.maximum(old["max_exp_avg_sq"], v_hat)
    elif adam.amsgrad:
        new["max_exp_avg_sq"] = np.maximum(old["max_exp_avg_sq"], new["exp_avg_sq"])
        v_hat = new["max_exp_avg_sq"] / (1 - beta2**t) if corrected else new["max_exp_avg_sq"]
    if adam.nesterov:
        m_hat = beta1 * new["exp_avg"] / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
    eps = adam.eps / math.sqrt(1 - beta2**t) if adam.formula == "keras" else adam.eps  # "epsilon hat" of the paper
    return new | {"param": old["param"] - adam.lr * m_hat / (np.sqrt(v_hat + adam.eps_root) + eps)}


@pytest.mark.parametrize("formula", KINDS)
def test_every_option_follows_the_equations(formula, check_equations) -> None:
    for optimizer in optimizers(formula):
        check_equations(optimizer, expected)


def test_the_optimizers_above_use_every_rule() -> None:
    used = {rule_for(optimizer, False)[0].name for formula in KINDS for optimizer in optimizers(formula)}
    assert used == {rule.name for rule in ADAM_RULES}


# --- by hand --------------------------------------------------------------------------------------------------


def after_one(run, optimizer: Adam) -> list[float]:
    return run(optimizer, np.ones(3), [np.array([4.0, -0.5, 0.0])])[0]["param"].tolist()


def test_first_step_of_torch_by_hand(run) -> None:
    """With both corrections, the first step is lr·g/(|g| + eps): an exponent off by one would show here."""
    assert after_one(run, Adam(lr=0.1, eps=0.25)) == pytest.approx([1 - 0.4 / 4.25, 1 + 0.05 / 0.75, 1.0], rel=1e-14)


def test_first_step_of_keras_by_hand(run) -> None:
    """The term stands beside √v before its correction: lr·√c2·g/(√c2·|g| + eps), with √c2 = 1/2."""
    optimizer = Adam(lr=0.1, betas=(0.5, 0.75), eps=0.25, formula="keras")
    assert after_one(run, optimizer) == pytest.approx([1 - 0.05 * 4 / 2.25, 1 + 0.05 * 0.5 / 0.5, 1.0], rel=1e-14)


def test_first_step_of_optax_by_hand(run) -> None:
    optimizer = Adam(lr=0.1, eps=0.25, eps_root=9.0, formula="optax")
    root = math.sqrt(9.25)
    assert after_one(run, optimizer) == pytest.approx([1 - 0.4 / 5.25, 1 + 0.05 / (root + 0.25), 1.0], rel=1e-14)


def test_first_step_of_optaxs_nesterov_by_hand(run) -> None:
    """With β1 = 1/2: m = g/2, so m̂ = ½·(g/2)/(1 − ¼) + ½·g/½ = 4/3·g."""
    optimizer = Adam(lr=0.1, betas=(0.5, 0.75), eps=1e-30, formula="optax", nesterov=True)
    assert after_one(run, optimizer) == pytest.approx([1 - 0.4 / 3, 1 + 0.4 / 3, 1.0], rel=1e-14)


def test_first_step_without_correction_by_hand(run) -> None:
    optimizer = Adam(lr=0.1, eps=0.25, betas=(0.5, 0.75), formula="no_bias_correction")
    assert after_one(run, optimizer) == pytest.approx([1 - 0.2 / 2.25, 1 + 0.025 / 0.5, 1.0], rel=1e-14)


def test_first_step_with_decay_by_hand(run) -> None:
    """All elements are 1, so an update of −0.1·sign(g) and decay of 0.1·0.5·p are easily told apart."""
    numbers: dict[str, Any] = {"lr": 0.1, "eps": 1e-30, "weight_decay": 0.5}
    assert after_one(run, Adam(**numbers)) == pytest.approx([0.9, 1.0, 0.9]), "L2 alone moves by lr, or cancels"
    assert after_one(run, AdamW(**numbers)) == pytest.approx([0.95 - 0.1, 0.95 + 0.1, 0.95])
    after = after_one(run, AdamW(**numbers, formula="decay_after"))
    assert after == pytest.approx([0.9 * 0.95, 1.1 * 0.95, 0.95])


def test_amsgrad_keeps_the_maximum_of_the_raw_second_moment(run) -> None:
    optimizer = Adam(lr=1.0, betas=(0.0, 0.5), eps=0.0, amsgrad=True)
    one, two, three = run(optimizer, np.zeros(1), [np.array([value]) for value in (4.0, 0.0, 2.0)])
    assert (one["param"][0], one["exp_avg_sq"][0], one["max_exp_avg_sq"][0]) == (-1.0, 8.0, 8.0)
    assert (two["exp_avg"][0], two["exp_avg_sq"][0], two["max_exp_avg_sq"][0]) == (0.0, 4.0, 8.0)
    assert (three["exp_avg_sq"][0], three["max_exp_avg_sq"][0]) == (4.0, 8.0)
    assert three["param"][0] - two["param"][0] == pytest.approx(-2.0 / math.sqrt(8.0 / (1 - 0.5**3)))


def test_amsgrad_of_optax_keeps_the_maximum_of_the_corrected_one(run) -> None:
    optimizer = Adam(lr=1.0, betas=(0.0, 0.5), eps=0.0, amsgrad="corrected", formula="optax")
    states = run(optimizer, np.zeros(1), [np.array([value]) for value in (4.0, 0.0, 2.0)])
    assert [state["max_exp_avg_sq"][0] for state in states] == [16.0, 16.0, 16.0]
    assert states[2]["param"][0] - states[1]["param"][0] == pytest.approx(-2.0 / 4.0)


def test_betas_of_zero_follow_the_sign(run) -> None:
    states = run(Adam(lr=0.5, betas=(0.0, 0.0), eps=0.0), np.zeros(2), [np.array([3.0, -1e-9])] * 3)
    assert [state["param"].tolist() for state in states] == [[-0.5, 0.5], [-1.0, 1.0], [-1.5, 1.5]]


def test_a_beta1_of_zero_is_the_gradient_whatever_came_before(run) -> None:
    """M + (g − m) would be 0 here: float32 has no 1e8 − 1e-3."""
    grads = np.float32([[1e8], [1e-3]])
    last = run(Adam(lr=1.0, betas=(0.0, 0.0)), np.zeros(1, np.float32), grads)[-1]
    assert last["exp_avg"][0] == np.float32(1e-3)
    assert last["param"][0] == pytest.approx(-2.0, rel=1e-4)


@pytest.mark.parametrize("g", [1e-9, 1e-8, 1e-7, 1e-25])
def test_with_betas_of_zero_eps_still_bounds_the_ratio(g, run) -> None:
    (state,) = run(Adam(lr=1.0, betas=(0.0, 0.0)), np.zeros(1, np.float32), [np.float32([g])])
    assert state["param"][0] == pytest.approx(-g / (g + 1e-8), rel=1e-5)


def test_a_rate_of_zero_moves_the_moments_alone(run) -> None:
    (state,) = run(AdamW(lr=0.0), np.ones(2), [np.array([3.0, -2.0])])
    assert state["param"].tolist() == [1.0, 1.0]
    assert state["exp_avg"].tolist() == pytest.approx([0.3, -0.2])


@pytest.mark.parametrize("optimizer", [Adam(), Adam(amsgrad=True), AdamW(), AdamW(amsgrad=True)], ids=repr)
def test_infinite_parameters_survive_unless_decay_is_in_the_gradient(optimizer, run) -> None:
    (state,) = run(optimizer, np.array([np.inf, -np.inf]), [np.ones(2)])
    assert state["param"].tolist() == [np.inf, -np.inf]


def test_decay_of_each_formula_acts_where_it_says() -> None:
    assert rule_for(Adam(), False)[1] is Decay.GRADIENT
    assert rule_for(AdamW(), False)[1] is Decay.BEFORE
    assert rule_for(AdamW(formula="keras"), False)[1] is Decay.APART
    assert rule_for(AdamW(formula="optax"), False)[1] is Decay.WITHIN
    assert rule_for(AdamW(formula="decay_after"), False)[1] is Decay.AFTER
