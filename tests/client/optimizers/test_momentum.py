"""SGD and Lion."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import SGD, Hyperparameters, Lion


def test_defaults_are_the_published_ones() -> None:
    assert SGD().hyperparameters() == Hyperparameters(lr=1e-3, weight_decay=0.0, momentum=0.0, dampening=0.0)
    assert Lion().hyperparameters() == Hyperparameters(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0)
    assert (SGD().structure().formula, Lion().structure().formula) == ("torch", "optax")


@pytest.mark.parametrize("numbers", [{}, {"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(numbers: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="nesterov needs momentum > 0 and dampening 0") as refused:
        SGD(nesterov=True, **numbers)
    assert refused.value.metadata == {"field": "optimizer.momentum"}
    assert SGD(**numbers).structure().nesterov is False


@pytest.mark.parametrize("overrides", [{"momentum": 0.0}, {"dampening": 0.5}])
def test_a_step_may_not_take_nesterovs_momentum_away(overrides: dict[str, float]) -> None:
    optimizer = SGD(nesterov=True, momentum=0.9)
    base = optimizer.hyperparameters()
    with pytest.raises(InvalidRequestError) as refused:
        optimizer.override(base, overrides, "begin.groups[1]")
    assert refused.value.metadata == {"field": "begin.groups[1].momentum"}
    assert optimizer.override(base, {"momentum": 0.5}, "begin").momentum == 0.5
    assert SGD(momentum=0.9).override(base, overrides, "begin").used() == base.used()


def test_dampening_without_momentum_is_refused_because_it_would_do_nothing() -> None:
    with pytest.raises(InvalidRequestError, match=r"dampening is 0\.5 and momentum 0") as refused:
        SGD(dampening=0.5)
    assert refused.value.metadata == {"field": "optimizer.dampening"}
    momentum = SGD(momentum=0.9, dampening=0.5)
    with pytest.raises(InvalidRequestError) as refused:
        momentum.override(momentum.hyperparameters(), {"momentum": 0.0}, "hyperparameters[0]")
    assert refused.value.metadata == {"field": "hyperparameters[0].dampening"}
