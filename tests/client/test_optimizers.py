"""Ranges of every number, and what a user may override."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from stepwire.errors import InvalidRequestError, Reason
from stepwire.optimizers import OVERRIDABLE, Adam, AdamW, Hyperparameters

BASE = Adam().hyperparameters()

ALLOWED = {
    "lr": (0.0, 1e-3, 1, 1e30, np.float32(0.5), np.float64(0.5), np.int64(2)),
    "beta1": (0.0, 0.9, math.nextafter(1.0, 0.0), np.float32(0.5)),
    "beta2": (0.0, 0.999, 0, np.float16(0.5)),
    "eps": (0.0, 1e-8, 1, np.array(1e-6)),
    "weight_decay": (0.0, 0.1, 5),
    "maximize": (True, False),
}
REFUSED = {
    "lr": (-1e-9, math.nan, math.inf, -math.inf, "0.1", b"0.1", None, [0.1], True, 10**400),
    "beta1": (1.0, 1, -0.1, math.nan, math.inf, "0.9", None, False),
    "beta2": (1.0, 1.5, -1e-300, math.nan, (0.9,), True),
    "eps": (-1e-300, math.nan, math.inf, "tiny", None, True),
    "weight_decay": (-0.01, math.nan, math.inf, object(), True),
    "maximize": (0, 1, "yes", None, np.True_),
}


def cases(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in table.items() for value in values]


def test_both_tables_speak_of_every_number() -> None:
    assert set(ALLOWED) == set(REFUSED) == set(OVERRIDABLE)


@pytest.mark.parametrize(("name", "value"), cases(ALLOWED))
def test_a_value_in_range_is_taken(name: str, value: Any) -> None:
    changed = BASE.replace({name: value})
    assert getattr(changed, name) == value
    others = {other: getattr(BASE, other) for other in OVERRIDABLE if other != name}
    assert {other: getattr(changed, other) for other in others} == others


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        BASE.replace({name: value}, "begin.hyperparameters[1]")
    assert refused.value.reason is Reason.INVALID_CONFIG
    assert refused.value.metadata == {"field": f"begin.hyperparameters[1].{name}"}
    assert repr(value)[:40] in str(refused.value)


def test_betas_stand_for_both() -> None:
    changed = BASE.replace({"betas": (0.5, 0.75)})
    assert (changed.beta1, changed.beta2) == (0.5, 0.75)
    assert BASE.replace({"betas": [0.25, 0.5]}) == BASE.replace({"beta1": 0.25, "beta2": 0.5})


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {0.9, 0.99}])
def test_betas_are_two_numbers(betas: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"hyperparameters\.betas: .* must be two numbers"):
        BASE.replace({"betas": betas})


@pytest.mark.parametrize(("betas", "place"), [(("x", 0.9), "betas[0]"), ((0.9, None), "betas[1]")])
def test_a_beta_that_is_no_number_is_named_by_its_place(betas: Any, place: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        Adam(betas=betas)
    assert refused.value.metadata == {"field": f"optimizer.{place}"}


@pytest.mark.parametrize("name", ["momentum", "learning_rate", "amsgrad", "formula", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="unknown hyper-parameter .* use one of: betas, lr, beta1, beta2"):
        BASE.replace({name: 0.5})


def test_replacing_nothing_changes_nothing() -> None:
    assert BASE.replace({}) == BASE


def test_adams_defaults_are_torchs() -> None:
    assert BASE == Hyperparameters(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False)
    assert dataclasses.asdict(Adam()) == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
        "formula": "torch",
    }


def test_adamw_is_adam_with_decoupled_decay() -> None:
    assert dataclasses.asdict(AdamW()) == dataclasses.asdict(Adam(weight_decay=1e-2, decoupled_weight_decay=True))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "optimizer.lr"),
        ({"betas": (1.0, 0.9)}, "optimizer.beta1"),
        ({"betas": (0.9, 1.0)}, "optimizer.beta2"),
        ({"eps": math.nan}, "optimizer.eps"),
        ({"weight_decay": math.inf}, "optimizer.weight_decay"),
        ({"maximize": 1}, "optimizer.maximize"),
        ({"amsgrad": "yes"}, "optimizer.amsgrad"),
        ({"decoupled_weight_decay": 0}, "optimizer.decoupled_weight_decay"),
        ({"formula": "tensorflow"}, "optimizer.formula"),
        ({"formula": None}, "optimizer.formula"),
    ],
)
def test_an_optimizer_refuses_each_wrong_option(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        Adam(**options)
    assert refused.value.metadata == {"field": field}


def test_optimizers_are_values() -> None:
    assert Adam(lr=0.5) == Adam(lr=0.5)
    assert Adam(lr=0.5) != Adam(lr=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Adam().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Adam(1e-3)  # type: ignore[misc]
