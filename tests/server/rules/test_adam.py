"""The formulas against the equations, written here once more, in float64."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from stepwire.optimizers import Adam, AdamW
from stepwire_server.engines.rule_source import functions_of
from stepwire_server.rules import ALL_RULES, SERVED_FORMULAS, rule_for, slots_for

SIZE = 37

OPTIMIZERS = [
    Adam(
        lr=0.01,
        betas=betas,
        eps=eps,
        weight_decay=decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled,
        formula=formula,
    )
    for formula, amsgrad, maximize, (decay, decoupled), (betas, eps) in itertools.product(
        ["torch", "no_bias_correction"],
        [False, True],
        [False, True],
        [(0.0, False), (0.3, False), (0.3, True)],
        [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3)],
    )
]


def gradients(steps: int) -> np.ndarray:
    """Gradients that fall by a factor of 10 halfway, so that a running maximum shows."""
    values = np.random.default_rng(7).standard_normal((steps, SIZE))
    values[steps // 2 :] /= 10.0
    return values


def expected(optimizer: Adam, start: np.ndarray, grads: np.ndarray) -> tuple[np.ndarray, ...]:
    """Adam as in Kingma & Ba, algorithm 1, with hats; AMSGrad with the maximum of the raw v."""
    beta1, beta2 = optimizer.betas
    theta, m, v, v_max = start.copy(), np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for t, grad in enumerate(grads, start=1):
        g = -grad if optimizer.maximize else grad
        if optimizer.decoupled_weight_decay:
            theta = theta - optimizer.lr * optimizer.weight_decay * theta
        else:
            g = g + optimizer.weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        v_max = np.maximum(v_max, v)
        used = v_max if optimizer.amsgrad else v
        corrected = optimizer.formula == "torch"
        m_hat = m / (1 - beta1**t) if corrected else m
        v_hat = used / (1 - beta2**t) if corrected else used
        theta = theta - optimizer.lr * m_hat / (np.sqrt(v_hat) + optimizer.eps)
    return (theta, m, v, v_max) if optimizer.amsgrad else (theta, m, v)


def computed(optimizer: Adam, start: np.ndarray, grads: np.ndarray) -> tuple[np.ndarray, ...]:
    hyper = optimizer.hyperparameters()
    rule = rule_for(optimizer, hyper)
    state = (start, *(np.zeros(SIZE) for _ in rule.slots))
    for t, grad in enumerate(grads, start=1):
        state = rule.update(state[0], grad, *state[1:], *rule.scalars(hyper, t))
    return state


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_every_option_follows_the_equations(steps: int) -> None:
    start, grads = np.random.default_rng(1).standard_normal(SIZE), gradients(steps)
    for optimizer in OPTIMIZERS:
        for got, want in zip(computed(optimizer, start, grads), expected(optimizer, start, grads), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13, err_msg=repr(optimizer))


def test_the_optimizers_above_use_every_rule() -> None:
    used = {rule_for(optimizer, optimizer.hyperparameters()).name for optimizer in OPTIMIZERS}
    assert used == {rule.name for rule in ALL_RULES}


def test_first_step_of_adam_by_hand() -> None:
    """With both corrections, the first step is lr·g/(|g| + eps): an exponent off by one would show here."""
    grad = np.array([4.0, -0.5, 0.0])
    optimizer = Adam(lr=0.1, eps=0.25)
    rule = rule_for(optimizer, optimizer.hyperparameters())
    p, m, v = rule.update(np.ones(3), grad, 0.0, 0.0, *rule.scalars(optimizer.hyperparameters(), 1))
    np.testing.assert_allclose(p, [1 - 0.1 * 4 / 4.25, 1 + 0.1 * 0.5 / 0.75, 1.0], rtol=1e-14)
    np.testing.assert_allclose(m, [0.4, -0.05, 0.0], rtol=1e-14)
    np.testing.assert_allclose(v, [0.016, 0.00025, 0.0], rtol=1e-13)


def test_first_step_without_correction_by_hand() -> None:
    optimizer = Adam(lr=0.1, eps=0.25, betas=(0.5, 0.75), formula="no_bias_correction")
    rule = rule_for(optimizer, optimizer.hyperparameters())
    p, m, v = rule.update(1.0, 4.0, 0.0, 0.0, *rule.scalars(optimizer.hyperparameters(), 1))
    assert (m, v) == (2.0, 4.0)
    assert p == pytest.approx(1 - 0.1 * 2.0 / 2.25, rel=1e-14)


def test_correction_counts_this_update() -> None:
    hyper = Adam(lr=0.1).hyperparameters()
    scalars = rule_for(Adam(), hyper).scalars
    for t in (1, 2, 1000):
        assert scalars(hyper, t)[5] == 0.1 / (1 - 0.9**t)
        assert scalars(hyper, t)[6] == math.sqrt(1 - 0.999**t)


def test_amsgrad_keeps_the_maximum_of_the_raw_second_moment() -> None:
    optimizer = Adam(lr=1.0, betas=(0.0, 0.5), eps=0.0, amsgrad=True)
    rule, hyper = rule_for(optimizer, optimizer.hyperparameters()), optimizer.hyperparameters()
    p, m, v, x = rule.update(0.0, 4.0, 0.0, 0.0, 0.0, *rule.scalars(hyper, 1))
    assert (p, m, v, x) == (-1.0, 4.0, 8.0, 8.0)
    p, m, v, x = rule.update(0.0, 0.0, m, v, x, *rule.scalars(hyper, 2))
    assert (m, v, x) == (0.0, 4.0, 8.0)
    p, m, v, x = rule.update(0.0, 2.0, m, v, x, *rule.scalars(hyper, 3))
    assert (v, x) == (4.0, 8.0)
    assert p == pytest.approx(-2.0 / math.sqrt(8.0 / (1 - 0.5**3)))  # a corrected maximum would be 16


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_update_takes_what_the_rule_says(rule) -> None:
    integers = dataclasses.replace(AdamW().hyperparameters(), lr=1, beta2=0, eps=np.float32(1), weight_decay=2)
    scalars = rule.scalars(integers, 1)
    assert len(inspect.signature(rule.update).parameters) == 2 + len(rule.slots) + len(scalars)
    assert all(type(scalar) is float for scalar in scalars)
    result = rule.update(1.0, 1.0, *[0.0] * len(rule.slots), *scalars)
    assert len(result) == 1 + len(rule.slots)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_update_leaves_its_arguments_alone(rule) -> None:
    arrays = [np.full(3, 0.5) for _ in range(2 + len(rule.slots))]
    rule.update(*arrays, *rule.scalars(AdamW().hyperparameters(), 1))
    assert all((array == 0.5).all() for array in arrays)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_update_stays_in_float32_and_has_no_literals(rule) -> None:
    arrays = [np.full(3, 0.5, np.float32) for _ in range(2 + len(rule.slots))]
    scalars = [np.float32(scalar) for scalar in rule.scalars(AdamW().hyperparameters(), 1)]
    assert {value.dtype.name for value in rule.update(*arrays, *scalars)} == {"float32"}
    for function in functions_of(rule.update):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert literals == [inspect.getdoc(function)], function.__name__


@pytest.mark.parametrize("optimizer", [Adam(), Adam(amsgrad=True), AdamW(), AdamW(amsgrad=True)], ids=repr)
def test_infinite_parameters_survive_unless_decay_is_in_the_gradient(optimizer: Adam) -> None:
    hyper = optimizer.hyperparameters()
    rule = rule_for(optimizer, hyper)
    p, *_ = rule.update(np.array([np.inf, -np.inf]), 1.0, *[0.0] * len(rule.slots), *rule.scalars(hyper, 1))
    assert p.tolist() == [np.inf, -np.inf]


def test_zero_decay_multiplies_by_exactly_one() -> None:
    hyper = Adam(lr=0.3).hyperparameters()
    assert rule_for(Adam(), hyper).scalars(hyper, 1)[1] == 1.0


def test_a_step_may_switch_decay_on() -> None:
    adam = Adam()
    hyper = adam.hyperparameters()
    assert rule_for(adam, hyper).name == "adam"
    assert rule_for(adam, hyper.replace({"weight_decay": 0.1})).name == "adam_l2"
    assert rule_for(AdamW(), hyper.replace({"weight_decay": 0.1})).name == "adam"


def test_slots_are_those_of_every_rule_a_session_may_use() -> None:
    assert slots_for(Adam()) == ("exp_avg", "exp_avg_sq")
    assert slots_for(AdamW(amsgrad=True)) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for optimizer in OPTIMIZERS:
        assert rule_for(optimizer, optimizer.hyperparameters()).slots == slots_for(optimizer)


def test_names_are_unique_and_formulas_served() -> None:
    assert len({rule.name for rule in ALL_RULES}) == len(ALL_RULES) == 8
    assert SERVED_FORMULAS == {"torch", "no_bias_correction"}


def test_rules_load_no_engine() -> None:
    script = (
        "import sys, stepwire_server.rules;"
        "print(sorted({'cupy', 'grpc', 'numba', 'stepwire_server.engines'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
