"""RMSprop, Adagrad and Adadelta."""

from __future__ import annotations

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Adadelta, Adagrad, Hyperparameters, RMSprop


def test_defaults_are_torchs() -> None:
    assert RMSprop().hyperparameters() == Hyperparameters(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0)
    assert Adagrad().hyperparameters() == Hyperparameters(lr=1e-2, decay=0.0, eps=1e-10, weight_decay=0.0)
    assert Adadelta().hyperparameters() == Hyperparameters(lr=1.0, alpha=0.9, eps=1e-6, weight_decay=0.0)
    assert (RMSprop().centered, Adagrad().initial_accumulator_value) == (False, 0.0)


def test_names_of_torch_and_of_the_contract_mean_the_same() -> None:
    rho, rate = Adadelta(), Adagrad()
    for names in ("rho", "alpha"):
        assert rho.override(rho.hyperparameters(), {names: 0.5}, "begin").alpha == 0.5
    for names in ("lr_decay", "decay"):
        assert rate.override(rate.hyperparameters(), {names: 0.5}, "begin").decay == 0.5
    with pytest.raises(InvalidRequestError, match="unknown hyper-parameter 'rho'"):
        RMSprop().override(RMSprop().hyperparameters(), {"rho": 0.5}, "begin")


@pytest.mark.parametrize("value", [0.0, 1, 3e38])
def test_an_accumulator_starts_from_a_float32(value: float) -> None:
    assert Adagrad(initial_accumulator_value=value).structure().initial_accumulator_value == value


@pytest.mark.parametrize("value", [-1e-9, 3.1e38, float("nan"), float("inf")])
def test_an_accumulator_starts_from_nothing_else(value: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"it must be in \[0, 3e38\]") as refused:
        Adagrad(initial_accumulator_value=value)
    assert refused.value.metadata == {"field": "optimizer.initial_accumulator_value"}
    with pytest.raises(InvalidRequestError):
        Adagrad().override(Adagrad().hyperparameters(), {"initial_accumulator_value": 0.5}, "begin")
