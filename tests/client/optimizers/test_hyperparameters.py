"""Ranges of every number, and the overrides of a step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from stepwire.errors import InvalidRequestError, Reason
from stepwire.optimizers import LARGEST_NUMBER, OVERRIDABLE, Adam, Hyperparameters

EVERYTHING = Hyperparameters(**{name: False if name == "maximize" else 0.25 for name in OVERRIDABLE})
ADAM = Adam().hyperparameters()

WEIGHT = (0.0, 0, 0.9, math.nextafter(1.0, 0.0), np.float32(0.5), np.float16(0.5))
NOT_WEIGHT = (1.0, 1, 1.5, -1e-300, math.nan, math.inf, "0.9", None, False, (0.9,))
SIZE = (0.0, 1e-300, 1, 1e30, np.float64(0.5), np.int64(2), np.array(1e-6))
NOT_SIZE = (-1e-300, math.nan, math.inf, -math.inf, "0.1", b"0.1", None, [0.1], True, 1j, object(), 10**400)
WORDS = {
    **dict.fromkeys(("beta1", "beta2", "momentum", "alpha"), (WEIGHT, NOT_WEIGHT, "in [0, 1)")),
    **dict.fromkeys(("lr", "eps", "weight_decay", "decay", "eps_root"), (SIZE, NOT_SIZE, "finite and >= 0")),
    "dampening": ((0.0, 0.5, 1, 1.0), (-1e-300, math.nextafter(1.0, 2.0), math.nan, "all", None, True), "in [0, 1]"),
    "trust_coefficient": (SIZE[1:], (0.0, -0.0, *NOT_SIZE), "finite and > 0"),
    "maximize": ((True, False), (0, 1, "yes", None, np.True_), "True or False"),
}
ALLOWED = [(name, value) for name, (values, _, _) in WORDS.items() for value in values]
REFUSED = [(name, value, words) for name, (_, values, words) in WORDS.items() for value in values]


def short(value: object) -> str:
    return f"{value!r:.20}"


def refusal(call: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        call()
    assert refused.value.reason is Reason.INVALID_CONFIG
    assert refused.value.metadata.keys() == {"field"}
    assert str(refused.value).startswith(refused.value.metadata["field"] + ": ")
    return refused.value


def test_the_table_speaks_of_every_number() -> None:
    assert set(WORDS) == set(OVERRIDABLE)
    assert tuple(field.name for field in dataclasses.fields(Hyperparameters)) == OVERRIDABLE


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=short)
def test_a_value_in_range_is_accepted(name: str, value: Any) -> None:
    changed = EVERYTHING.replace({name: value})
    assert getattr(changed, name) == value
    assert dataclasses.replace(changed, **{name: getattr(EVERYTHING, name)}) == EVERYTHING
    changed.check()


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=short)
def test_a_value_out_of_range_is_refused_with_its_place_and_the_range(name: str, value: Any, words: str) -> None:
    error = refusal(lambda: EVERYTHING.replace({name: value}, "begin.groups[1].hyperparameters"))
    assert error.metadata == {"field": f"begin.groups[1].hyperparameters.{name}"}
    assert repr(value)[:40] in str(error)
    assert words in str(error) or "is not a number that a float can represent" in str(error)
    if value is not None:  # None says that the rule has no such number
        changed = dataclasses.replace(EVERYTHING, **{name: value})
        assert refusal(lambda: changed.check("optimizer")).metadata == {"field": f"optimizer.{name}"}


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "trust_coefficient", "eps_root"])
def test_what_meets_elements_is_finite_in_float32(name: str) -> None:
    assert LARGEST_NUMBER == np.finfo(np.float32).max
    EVERYTHING.replace({name: LARGEST_NUMBER}).check()
    for value in (math.nextafter(LARGEST_NUMBER, math.inf), 1e39, 1e300):
        assert "in float32" in str(refusal(lambda value=value: EVERYTHING.replace({name: value})))
    EVERYTHING.replace({"decay": 1e300}).check()  # of the host's arithmetic, which is float64


@pytest.mark.parametrize("name", sorted(set(OVERRIDABLE) - {"maximize"}))
def test_an_array_is_no_number(name: str) -> None:
    assert refusal(lambda: EVERYTHING.replace({name: np.array([0.1, 0.2])})).metadata["field"].endswith(name)


def test_the_path_of_overrides_has_a_default() -> None:
    assert refusal(lambda: ADAM.replace({"lr": -1})).metadata == {"field": "hyperparameters.lr"}
    assert refusal(dataclasses.replace(ADAM, lr=-1.0).check).metadata == {"field": "hyperparameters.lr"}


# --- betas ----------------------------------------------------------------------------------------------------


def test_betas_stand_for_both() -> None:
    changed = ADAM.replace({"betas": (0.5, 0.75)})
    assert (changed.beta1, changed.beta2) == (0.5, 0.75)
    assert ADAM.replace({"betas": [0.25, 0.5]}) == ADAM.replace({"beta1": 0.25, "beta2": 0.5})


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {0.9, 0.99}], ids=short)
def test_betas_are_two_numbers(betas: Any) -> None:
    error = refusal(lambda: ADAM.replace({"betas": betas}))
    assert error.metadata == {"field": "hyperparameters.betas"}
    assert "must be two numbers" in str(error)


@pytest.mark.parametrize(("betas", "place"), [(("x", 0.9), "betas[0]"), ((0.9, None), "betas[1]")], ids=short)
def test_a_beta_that_is_no_number_is_named_by_its_place(betas: Any, place: str) -> None:
    assert refusal(lambda: Adam(betas=betas)).metadata == {"field": f"optimizer.{place}"}
    assert refusal(lambda: ADAM.replace({"betas": betas}, "begin")).metadata == {"field": f"begin.{place}"}


def test_betas_out_of_range_are_named_one_by_one() -> None:
    assert refusal(lambda: Adam(betas=(1.0, 0.9))).metadata == {"field": "optimizer.beta1"}
    assert refusal(lambda: ADAM.replace({"betas": (0.9, -0.1)})).metadata == {"field": "hyperparameters.beta2"}


# --- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learning_rate", "amsgrad", "formula", "rho", ""], ids=short)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    error = refusal(lambda: ADAM.replace({name: 0.5}))
    assert error.metadata == {"field": f"hyperparameters.{name}"}
    assert f"unknown hyper-parameter {name!r}; use one of: betas, lr, beta1, beta2, eps, " in str(error)


@pytest.mark.parametrize("name", ["momentum", "dampening", "alpha", "decay", "trust_coefficient", "eps_root"])
def test_a_name_of_other_rules_is_refused_as_such(name: str) -> None:
    error = refusal(lambda: ADAM.replace({name: 0.5}))
    assert f"{name!r} is a hyper-parameter of other rules; use one of: betas, lr" in str(error)


def test_betas_are_of_other_rules_where_there_are_none() -> None:
    error = refusal(lambda: Hyperparameters(lr=0.1, momentum=0.5).replace({"betas": (0.5, 0.5)}))
    assert str(error).endswith("'betas' is a hyper-parameter of other rules; use one of: lr, maximize, momentum")


def test_replacing_nothing_changes_nothing() -> None:
    assert ADAM.replace({}) == ADAM


def test_numbers_used_are_those_that_are_there() -> None:
    assert ADAM.used() == ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
    assert EVERYTHING.used() == OVERRIDABLE
    assert Hyperparameters(lr=0.0).used() == ("lr", "maximize")
