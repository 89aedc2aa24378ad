"""RMSprop, Adagrad and Adadelta against the equations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepwire.optimizers import LARGEST_NUMBER, Adadelta, Adagrad, RMSprop
from stepwire_server.rules.adaptive import ADAGRAD, deviation

Arrays = dict[str, np.ndarray]


def rmsprop(o: RMSprop, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    new = {"square_avg": o.alpha * old["square_avg"] + (1 - o.alpha) * g**2}
    variance = new["square_avg"]
    if o.centered:
        new["grad_avg"] = o.alpha * old["grad_avg"] + (1 - o.alpha) * g
        variance = variance - new["grad_avg"] ** 2
    step = g / (np.sqrt(variance) + o.eps)
    if o.momentum:
        step = new["momentum_buffer"] = o.momentum * old["momentum_buffer"] + step
    return new | {"param": old["param"] - o.lr * step}


def adagrad(o: Adagrad, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    before = np.full_like(g, o.initial_accumulator_value) if t == 1 else old["sum"]
    rate = o.lr / (1 + (t - 1) * o.lr_decay)
    return {"sum": before + g**2, "param": old["param"] - rate * g / (np.sqrt(before + g**2) + o.eps)}


def adadelta(o: Adadelta, t: int, g: np.ndarray, old: Arrays) -> Arrays:
    v = o.rho * old["square_avg"] + (1 - o.rho) * g**2
    u = np.sqrt(old["acc_delta"] + o.eps) / np.sqrt(v + o.eps) * g
    return {
        "square_avg": v,
        "acc_delta": o.rho * old["acc_delta"] + (1 - o.rho) * u**2,
        "param": old["param"] - o.lr * u,
    }


@pytest.mark.parametrize(("centered", "momentum"), list(itertools.product([False, True], [0.0, 0.9])))
def test_rmsprop_follows_the_equations(centered, momentum, check_equations) -> None:
    for (alpha, eps, maximize), decay in itertools.product([(0.99, 1e-8, False), (0.6, 1e-3, True)], [0.0, 0.3]):
        options = {"lr": 0.01, "alpha": alpha, "eps": eps, "weight_decay": decay, "maximize": maximize}
        check_equations(RMSprop(centered=centered, momentum=momentum, **options), rmsprop)


@pytest.mark.parametrize(("lr_decay", "start"), list(itertools.product([0.0, 0.1], [0.0, 0.5])))
def test_adagrad_follows_the_equations(lr_decay, start, check_equations) -> None:
    for (eps, maximize), decay in itertools.product([(1e-10, False), (1e-3, True)], [0.0, 0.3]):
        options = {"lr": 0.1, "eps": eps, "weight_decay": decay, "maximize": maximize}
        check_equations(Adagrad(lr_decay=lr_decay, initial_accumulator_value=start, **options), adagrad)


@pytest.mark.parametrize("rho", [0.0, 0.9, 0.99])
def test_adadelta_follows_the_equations(rho, check_equations) -> None:
    for (eps, maximize), decay in itertools.product([(1e-6, False), (1e-3, True)], [0.0, 0.3]):
        check_equations(Adadelta(lr=0.5, rho=rho, eps=eps, weight_decay=decay, maximize=maximize), adadelta)


# --- by hand --------------------------------------------------------------------------------------------------


def test_first_step_of_rmsprop_by_hand(run) -> None:
    """α = ¾ makes v = g²/4; centered, a = g/4 leaves a variance of 3/16·g²."""
    grads = [np.array([4.0])]
    (plain,) = run(RMSprop(lr=0.5, alpha=0.75, eps=1.0), np.ones(1), grads)
    assert (plain["square_avg"][0], plain["param"][0]) == pytest.approx((4.0, 1 - 0.5 * 4 / 3))
    (centered,) = run(RMSprop(lr=0.5, alpha=0.75, eps=1.0, centered=True), np.ones(1), grads)
    assert centered["param"][0] == pytest.approx(1 - 2.0 / (1 + 3**0.5))


def test_two_steps_of_rmsprops_momentum_by_hand(run) -> None:
    states = run(RMSprop(lr=0.5, alpha=0.0, eps=0.0, momentum=0.5), np.zeros(1), [np.array([4.0]), np.array([-2.0])])
    assert [state["momentum_buffer"][0] for state in states] == [1.0, -0.5]
    assert [state["param"][0] for state in states] == [-0.5, -0.25]


def test_two_steps_of_adagrad_by_hand(run) -> None:
    optimizer = Adagrad(lr=1.0, lr_decay=0.5, initial_accumulator_value=7.0, eps=0.0)
    states = run(optimizer, np.zeros(1), [np.array([3.0]), np.array([3.0])])
    assert [state["sum"][0] for state in states] == [16.0, 25.0]
    assert [state["param"][0] for state in states] == pytest.approx([-3 / 4, -3 / 4 - 1 / 1.5 * 3 / 5])


def test_adagrads_rate_falls_from_the_second_step_on() -> None:
    hyper = Adagrad(lr=1.0, lr_decay=0.5).hyperparameters()
    assert [ADAGRAD.scalars(hyper, t)[0] for t in (1, 2, 3)] == [1.0, 1 / 1.5, 1 / 2.0]


def test_first_step_of_adadelta_by_hand(run) -> None:
    (state,) = run(Adadelta(lr=0.5, rho=0.75, eps=1.0), np.zeros(1), [np.array([4.0])])
    u = 4.0 / 5**0.5
    assert (state["param"][0], state["acc_delta"][0]) == pytest.approx((-0.5 * u, u**2 / 4))


def test_variance_is_never_negative_and_nan_stays() -> None:
    one, bounds = np.float32(1.0), np.float32([0.0, LARGEST_NUMBER])
    assert deviation(one, np.nextafter(one, np.float32(2.0)), *bounds) == 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        assert np.isnan(deviation(np.float32(np.nan), one, *bounds))
        assert np.isnan(deviation(one, np.float32(np.nan), *bounds))
        assert deviation(np.float32(np.inf), one, *bounds) == np.inf
        assert deviation(np.float32(np.inf), np.float32(1e30), *bounds) == np.inf, "a² overflows as well"
        assert deviation(one, np.float32(1e30), *bounds) == 0.0


def test_a_constant_gradient_does_not_break_centered_rmsprop(run) -> None:
    """In float32, v − a² of a constant gradient is rounding alone, of either sign."""
    states = run(RMSprop(centered=True), np.zeros(5, np.float32), [np.full(5, 0.1, np.float32)] * 3000)
    assert np.isfinite(states[-1]["param"]).all()
