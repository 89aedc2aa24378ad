"""LAMB and LARS against the equations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepwire.optimizers import LAMB, LARGEST_NUMBER, LARS
from stepwire_server.rules.layerwise import LAMB as LAMB_RULE
from stepwire_server.rules.layerwise import LARS as LARS_RULE
from stepwire_server.rules.layerwise import LARS_NESTEROV

Arrays = dict[str, np.ndarray]
RULES = [(LAMB_RULE, LAMB()), (LARS_RULE, LARS()), (LARS_NESTEROV, LARS(nesterov=True))]


def norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(values**2)))


def lamb(o: LAMB, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    beta1, beta2 = o.betas
    m = beta1 * old["exp_avg"] + (1 - beta1) * g
    v = beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t) + o.eps_root) + o.eps) + o.weight_decay * old["param"]
    ratio = o.trust_coefficient * norm(old["param"]) / norm(u)
    return {"exp_avg": m, "exp_avg_sq": v, "param": old["param"] - o.lr * ratio * u}


def lars(o: LARS, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    u = g + o.weight_decay * old["param"]
    step = o.lr * o.trust_coefficient * norm(old["param"]) / (norm(u) + o.eps) * u
    b = o.momentum * old["momentum_buffer"] + step
    return {"momentum_buffer": b, "param": old["param"] - (step + o.momentum * b if o.nesterov else b)}


@pytest.mark.parametrize(("betas", "eps", "maximize"), [((0.9, 0.999), 1e-6, False), ((0.6, 0.8), 1e-3, True)])
def test_lamb_follows_the_equations(betas, eps, maximize, check_equations) -> None:
    for decay, (eps_root, trust) in itertools.product([0.0, 0.3], [(0.0, 1.0), (1e-4, 0.3)]):
        options = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": decay, "maximize": maximize}
        check_equations(LAMB(eps_root=eps_root, trust_coefficient=trust, **options), lamb)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lars_follows_the_equations(momentum, nesterov, check_equations) -> None:
    for decay, maximize, eps in itertools.product([0.0, 0.3], [False, True], [0.0, 0.1]):
        options = {"lr": 0.5, "weight_decay": decay, "maximize": maximize, "eps": eps}
        check_equations(LARS(momentum=momentum, nesterov=nesterov, trust_coefficient=1e-2, **options), lars)


# --- by hand --------------------------------------------------------------------------------------------------


def test_first_step_of_lamb_by_hand(run) -> None:
    """Without eps, Adam's direction is the sign: its norm is √2, that of the parameters 5."""
    (state,) = run(LAMB(lr=0.1, eps=0.0), np.array([3.0, -4.0]), [np.array([0.01, 100.0])])
    step = 0.1 * 5 / 2**0.5
    assert state["param"].tolist() == pytest.approx([3 - step, -4 - step], rel=1e-14)


def test_first_steps_of_lars_by_hand(run) -> None:
    """‖p‖ = 5, and ‖g + ½·p‖ = ‖(4.5, 6)‖ = 7.5."""
    start, grads = np.array([3.0, 4.0]), [np.array([3.0, 4.0])]
    options = {"lr": 2.0, "momentum": 0.5, "weight_decay": 0.5, "trust_coefficient": 0.1}
    (plain,) = run(LARS(**options), start, grads)
    assert plain["param"].tolist() == pytest.approx([3 - 0.6, 4 - 0.8], rel=1e-14)
    (ahead,) = run(LARS(**options, nesterov=True), start, grads)
    assert ahead["param"].tolist() == pytest.approx([3 - 0.9, 4 - 1.2], rel=1e-14)
    (careful,) = run(LARS(**options, eps=7.5), start, grads)
    assert careful["param"].tolist() == pytest.approx([3 - 0.3, 4 - 0.4], rel=1e-14)


# --- trust ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_trust_is_one_where_a_norm_is_zero(rule, optimizer) -> None:
    hyper = optimizer.hyperparameters()
    one = (hyper.lr, 1.0)
    assert rule.trust(hyper, 0.0, 5.0) == rule.trust(hyper, 5.0, 0.0) == rule.trust(hyper, 0.0, 0.0) == one
    assert rule.trust(hyper, 1e-300, 1e-300) == (hyper.lr, hyper.trust_coefficient)


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_trust_is_the_ratio_of_norms(rule, optimizer) -> None:
    hyper = optimizer.hyperparameters().replace({"trust_coefficient": 0.5, "eps": 2.0})
    added = 2.0 if rule is not LAMB_RULE else 0.0
    assert rule.trust(hyper, 3.0, 4.0) == pytest.approx((hyper.lr, 0.5 * 3.0 / (4.0 + added)), rel=1e-15)


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
@pytest.mark.parametrize(("param_norm", "direction_norm"), [(1e3, 1e-44), (3e38, 1.4e-45), (1.0, 1e-38)])
def test_lr_carries_what_a_ratio_is_beyond_float32(rule, optimizer, param_norm, direction_norm) -> None:
    hyper = optimizer.hyperparameters().replace({"trust_coefficient": 1e3, "eps": 0.0, "lr": 0.25})
    lr, trust = rule.trust(hyper, param_norm, direction_norm)
    assert 0.0 < max(lr, trust) <= LARGEST_NUMBER
    wanted = 0.25 * 1e3 * param_norm / direction_norm
    assert lr * trust == pytest.approx(min(wanted, LARGEST_NUMBER**2), rel=1e-12)


def test_eps_of_lars_does_not_save_a_zero_direction() -> None:
    """optax: where either norm is zero the ratio is one, whatever eps is."""
    assert LARS_RULE.trust(LARS(eps=0.5).hyperparameters(), 1.0, 0.0) == (1.0, 1.0)


def test_zero_parameters_are_moved(run) -> None:
    (state,) = run(LARS(lr=0.5, trust_coefficient=1e-3), np.zeros(2), [np.array([1.0, 2.0])])
    assert state["param"].tolist() == [-0.5, -1.0]


@pytest.mark.parametrize(("rule", "optimizer"), RULES)
def test_update_follows_the_direction_that_was_measured(rule, optimizer) -> None:
    """What the norm is taken of and what is multiplied by it are two functions; they must agree to the bit."""
    random = np.random.default_rng(5)
    arrays = [random.standard_normal(50).astype(np.float32) for _ in range(2 + len(rule.slots))]
    arrays[2:] = [abs(array) for array in arrays[2:]]
    hyper = optimizer.hyperparameters().replace({"weight_decay": 0.1, "lr": 1.0})
    scalars = [np.float32(scalar) for scalar in rule.scalars(hyper, 3)]
    if rule is not LAMB_RULE:
        scalars[1] = np.float32(0.0)  # momentum: then the step is the direction
    step = rule.direction(*arrays, *scalars)
    moved = rule.update(*arrays, *scalars, np.float32(1.0))[0]
    assert (moved == arrays[0] - step).all()
