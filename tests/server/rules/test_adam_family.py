"""NAdam, RAdam and AdaMax against the equations."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import Adamax, NAdam, RAdam
from stepwire_server.rules.adam_family import ADAMAX, NADAM, RADAM

pytestmark = pytest.mark.many

Arrays = dict[str, np.ndarray]

OPTIONS: list[dict[str, Any]] = [
    {"betas": betas, "eps": eps, "maximize": maximize, "weight_decay": decay, "lr": 0.01}
    for (betas, eps, maximize), decay in itertools.product(
        [((0.9, 0.999), 1e-8, False), ((0.6, 0.8), 1e-3, True)], [0.0, 0.3]
    )
]


def moments(optimizer: Any, g: np.ndarray, old: Arrays) -> Arrays:
    beta1, beta2 = optimizer.betas
    return {
        "exp_avg": beta1 * old["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2,
    }


@functools.cache
def momenta(beta1: float, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Return μ and Π; element t − 1 is that of step t."""
    mu = beta1 * (1 - 0.5 * 0.96 ** (np.arange(1, 3000) * decay))
    return mu, np.cumprod(mu)


def nadam(o: NAdam, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    new = moments(o, g, old)
    mu, products = momenta(o.betas[0], o.momentum_decay)
    m_hat = mu[t] * new["exp_avg"] / (1 - products[t]) + (1 - mu[t - 1]) * g / (1 - products[t - 1])
    v_hat = new["exp_avg_sq"] / (1 - o.betas[1] ** t)
    return new | {"param": old["param"] - o.lr * m_hat / (np.sqrt(v_hat) + o.eps)}


def radam(o: RAdam, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    new, beta2 = moments(o, g, old), o.betas[1]
    m_hat = new["exp_avg"] / (1 - o.betas[0] ** t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    step = m_hat
    if rho > 5:
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        step = r * m_hat * math.sqrt(1 - beta2**t) / (np.sqrt(new["exp_avg_sq"]) + o.eps)
    return new | {"param": old["param"] - o.lr * step}


def adamax(o: Adamax, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    m = o.betas[0] * old["exp_avg"] + (1 - o.betas[0]) * g
    u = np.maximum(o.betas[1] * old["exp_inf"], np.abs(g) + o.eps)
    return {"exp_avg": m, "exp_inf": u, "param": old["param"] - o.lr / (1 - o.betas[0] ** t) * m / u}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("momentum_decay", [0.0, 4e-3, 0.5])
def test_nadam_follows_the_equations(momentum_decay, decoupled, check_equations) -> None:
    for options in OPTIONS:
        check_equations(NAdam(momentum_decay=momentum_decay, decoupled_weight_decay=decoupled, **options), nadam)


@pytest.mark.parametrize("decoupled", [False, True])
def test_radam_follows_the_equations(decoupled, check_equations) -> None:
    for options in OPTIONS:
        check_equations(RAdam(decoupled_weight_decay=decoupled, **options), radam)


def test_adamax_follows_the_equations(check_equations) -> None:
    for options in OPTIONS:
        check_equations(Adamax(**options), adamax)


# --- by hand --------------------------------------------------------------------------------------------------


def test_first_step_of_nadam_by_hand(run) -> None:
    """With ψ = 0 every μ is β1/2 = ¼; m = g/2, so m̂ = ¼·(g/2)/(1 − 1/16) + ¾·g/¾ = 17/15·g."""
    optimizer = NAdam(lr=0.15, betas=(0.5, 0.9), eps=0.0, momentum_decay=0.0)
    (state,) = run(optimizer, np.zeros(2), [np.array([4.0, -0.5])])
    assert state["param"].tolist() == pytest.approx([-0.17, 0.17], rel=1e-14)


def test_radam_follows_the_mean_alone_while_rho_is_small(run) -> None:
    """At β2 = 0.999, ρ is 1 at t = 1 and first above 5 at t = 6; before, the step is lr·m̂, without a root."""
    grads = [np.array([4.0, -0.5])] * 6
    states = run(RAdam(lr=0.1, eps=0.0), np.zeros(2), grads)
    for t in range(5):
        assert states[t]["param"].tolist() == pytest.approx([-0.4 * (t + 1), 0.05 * (t + 1)], rel=1e-12)
    last = states[5]["param"] - states[4]["param"]
    assert last[0] == pytest.approx(-last[1], rel=1e-9) and abs(last[0]) < 0.1


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.66])
def test_radam_with_a_short_memory_never_divides(beta2, run) -> None:
    """ρ∞ ≤ 5 leaves every step unrectified."""
    states = run(RAdam(lr=1.0, betas=(0.0, beta2)), np.zeros(1), [np.array([2.0])] * 50)
    assert states[-1]["param"][0] == pytest.approx(-100.0)


def test_first_step_of_adamax_by_hand(run) -> None:
    (state,) = run(Adamax(lr=0.1, eps=0.5), np.zeros(3), [np.array([4.0, -0.5, 0.0])])
    assert state["param"].tolist() == pytest.approx([-0.4 / 4.5, 0.05, 0.0], rel=1e-14)
    assert state["exp_inf"].tolist() == [4.5, 1.0, 0.5]


# --- NAdam's product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 1e-9, 4e-3, 0.1, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.9999])
def test_nadams_product_is_right_in_any_order(beta1, decay) -> None:
    """Sessions at different steps and with different numbers ask in turn; some go back after a load."""
    for t in (1, 2, 50, 3, 700, 1, 51, 2000, 1999):
        for beta in (beta1, 0.3):
            hyper = NAdam(lr=1.0, betas=(beta, 0.9), momentum_decay=decay).hyperparameters()
            mu, products = momenta(beta, decay)
            sizes = (1 - mu[t - 1]) / (1 - products[t - 1]), mu[t] / (1 - products[t])
            assert NADAM.scalars(hyper, t)[3:5] == pytest.approx(sizes, rel=1e-11)


PRODUCT = NADAM.tensor_scalar
assert PRODUCT is not None


@pytest.mark.parametrize("decay", [4e-3, 0.1, 0.5, 3.0])
def test_nadams_product_runs_as_torchs_does_where_numbers_change(decay) -> None:
    """Each momentum is of its own update's numbers; derived from the last numbers alone the product is another."""
    product = wanted = 1.0
    for t in range(1, 200):
        beta1 = (0.9, 0.5, 0.99)[t % 3]
        hyper = NAdam(betas=(beta1, 0.9), momentum_decay=decay).hyperparameters()
        mu, following = (beta1 * (1 - 0.5 * 0.96 ** (step * decay)) for step in (t, t + 1))
        sizes = NADAM.scalars(hyper, t, product)[3:5]
        wanted *= mu
        expected = hyper.lr * (1 - mu) / (1 - wanted), hyper.lr * following / (1 - wanted * following)
        assert sizes == pytest.approx(expected, rel=1e-12)
        product = PRODUCT.following(hyper, t, product)
        assert product == pytest.approx(wanted, rel=1e-12)
        assert t != 5 or PRODUCT.derived(hyper, t) != pytest.approx(product, rel=0.5)


@pytest.mark.parametrize("decay", [4e-3, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("beta1", [0.5, 0.9999])
def test_the_derived_product_is_the_running_one_of_the_same_numbers(decay, beta1) -> None:
    hyper, product = NAdam(betas=(beta1, 0.9), momentum_decay=decay).hyperparameters(), 1.0
    for t in range(1, 3000):
        product = PRODUCT.following(hyper, t, product)
        if t in (1, 2, 50, 1000, 2999):
            assert 1.0 - PRODUCT.derived(hyper, t) == pytest.approx(1.0 - product, rel=1e-11)
    assert PRODUCT.derived(hyper, 0) == 1.0


def test_nadams_product_of_many_settings() -> None:
    for index in range(600):
        hyper = NAdam(lr=1.0, betas=(index / 1000, 0.9)).hyperparameters()
        assert NADAM.scalars(hyper, 1)[3] == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [0.0, 1e-12, 4e-3, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("beta1", [0.9, math.nextafter(1.0, 0.0)])
def test_a_session_may_start_at_any_step(beta1, decay) -> None:
    """A loop over all steps before would never end."""
    hyper = NAdam(lr=0.5, betas=(beta1, 0.999), momentum_decay=decay).hyperparameters()
    sizes = NADAM.scalars(hyper, 2**53)[3:5]
    assert all(map(math.isfinite, sizes))
    if beta1 == 0.9 and decay > 1e-3:
        assert sizes == pytest.approx((0.05, 0.45))


@pytest.mark.parametrize("rule", [NADAM, RADAM, ADAMAX], ids=lambda rule: rule.name)
def test_scalars_are_finite_at_far_steps(rule) -> None:
    hyper = {"nadam": NAdam(), "radam": RAdam(), "adamax": Adamax()}[rule.name].hyperparameters()
    for t in (1, 10**6, 10**9, 2**53):
        *scalars, last = rule.scalars(hyper, t)
        assert all(map(math.isfinite, scalars))
        assert math.isfinite(last) or rule is RADAM, "the bound of a divisor without bound"
