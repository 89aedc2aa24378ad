"""Properties of every optimizer: no option is ignored or unchecked, and optimizers are values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest

import stepwire.optimizers
from stepwire.errors import InvalidRequestError, Reason
from stepwire.optimizers import (
    LAMB,
    LARGEST_NUMBER,
    OPTIMIZERS,
    OVERRIDABLE,
    SGD,
    Adam,
    AdamW,
    Formula,
    Optimizer,
    RuleStructure,
)

KINDS = [*OPTIMIZERS.values(), AdamW]
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]

OTHER: dict[str, Any] = {
    "lr": 0.123,
    "betas": (0.123, 0.456),
    "eps": 0.123,
    "weight_decay": 0.123,
    "amsgrad": True,
    "maximize": True,
    "decoupled_weight_decay": True,
    "formula": "keras",
    "nesterov": True,
    "eps_root": 0.123,
    "momentum": 0.123,
    "dampening": 0.123,
    "alpha": 0.123,
    "rho": 0.123,
    "centered": True,
    "lr_decay": 0.123,
    "momentum_decay": 0.123,
    "initial_accumulator_value": 0.123,
    "trust_coefficient": 0.123,
}
"""A value of each option that is nobody's default."""

WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(OTHER, (-0.1, math.nan, math.inf, "0.1", True)),
    "lr": (-0.1, math.nan, math.inf, "0.1", True, 10**400),
    "betas": (0.9, (0.9,), (0.9, 0.9, 0.9), (1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, math.nan), ("a", 0.5)),
    "momentum": (-0.1, 1.0, math.nan, "0.1", True),
    "alpha": (-0.1, 1.0, math.nan, "0.1", True),
    "rho": (-0.1, 1.0, math.nan, "0.1", True),
    "dampening": (-0.1, 1.1, math.nan, "0.1", True),
    "trust_coefficient": (0.0, -0.1, math.nan, math.inf, "0.1", True),
    "initial_accumulator_value": (-0.1, math.nan, math.inf, 1e39, "0.1", True),
    **dict.fromkeys(("maximize", "decoupled_weight_decay", "nesterov", "centered"), (0, 1, "yes", np.True_)),
    "amsgrad": (0, 1, 1.0, np.True_, "yes", "none", "", [], 2),
    "formula": ("tensorflow", "", 1, "Torch", []),
}
CONTRACT = {"rho": "alpha", "lr_decay": "decay", "momentum_decay": "decay"}
"""Names of constructors that the contract has another name for."""


def companions(kind: type[Optimizer], name: str) -> dict[str, Any]:
    """Return options without which this one would be refused."""
    if kind.rule == "adam" and name in ("nesterov", "eps_root"):
        return {"formula": "optax"}
    return {"momentum": 0.5} if kind.rule == "sgd" and name in ("nesterov", "dampening") else {}


def refusal(call: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        call()
    assert refused.value.reason is Reason.INVALID_CONFIG
    return refused.value


def test_the_tables_speak_of_every_option() -> None:
    assert {name for _, name in FIELDS} == set(OTHER) == set(WRONG)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_option_is_sent(kind: type[Optimizer], name: str) -> None:
    others = companions(kind, name)
    value = not getattr(kind(), name) if isinstance(OTHER[name], bool) and name != "amsgrad" else OTHER[name]
    plain, changed = kind(**others), kind(**others, **{name: value})
    assert getattr(plain, name) != value
    assert (plain.hyperparameters(), plain.structure()) != (changed.hyperparameters(), changed.structure())


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_option_is_checked(kind: type[Optimizer], name: str) -> None:
    for value in WRONG[name]:
        error = refusal(lambda value=value: kind(**companions(kind, name) | {name: value}))
        field = error.metadata["field"].removeprefix("optimizer.")
        allowed = ("betas", "beta1", "beta2", "betas[0]") if name == "betas" else (name, CONTRACT.get(name))
        assert field in allowed
        assert str(error).startswith(f"optimizer.{field}: ")


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_none_is_no_value(kind: type[Optimizer], name: str) -> None:
    if (kind.rule, name) == ("adam", "eps") or (kind, name) == (AdamW, "weight_decay"):
        assert kind(**{name: None}) == kind(), "the formula's own"
        return
    assert refusal(lambda: kind(**{name: None})).metadata == {"field": f"optimizer.{name}"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_of_no_optimizer_is_a_mistake(kind: type[Optimizer]) -> None:
    for name in ("learning_rate", "foreach", "momentums"):
        with pytest.raises(TypeError, match=name):
            kind(**{name: 0.5})


@pytest.mark.parametrize("kind", KINDS)
def test_options_go_by_name(kind: type[Optimizer]) -> None:
    with pytest.raises(TypeError):
        kind(1e-3)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_are_values(kind: type[Optimizer]) -> None:
    assert kind(lr=0.5) == kind(lr=0.5)
    assert kind(lr=0.5) != kind(lr=0.25)
    assert hash(kind(lr=0.5)) == hash(kind(lr=0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().lr = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_constructor(kind: type[Optimizer]) -> None:
    optimizer = kind()
    numbers = optimizer.hyperparameters()
    expected = {CONTRACT.get(name, name): value for name, value in dataclasses.asdict(optimizer).items()}
    if "betas" in expected:
        expected["beta1"], expected["beta2"] = expected["betas"]
    if kind.rule == "adam":  # has it in one formula only, and it is zero
        assert expected.pop("eps_root") == 0.0
    assert {name: getattr(numbers, name) for name in numbers.used()} == {
        name: expected[name] for name in OVERRIDABLE if name in expected
    }


@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_that_of_the_constructor(kind: type[Optimizer]) -> None:
    optimizer = kind()
    structure = optimizer.structure()
    assert structure.formula == getattr(optimizer, "formula", kind.published)
    assert structure.formula in get_args(Formula)
    for name in set(RuleStructure._fields) - {"formula", "amsgrad"}:
        assert getattr(structure, name) == getattr(optimizer, name, RuleStructure._field_defaults[name])
    assert structure.amsgrad == "none"


# --- overrides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_may_be_overridden_by_either_name(kind: type[Optimizer]) -> None:
    optimizer = kind(**companions(kind, "dampening"))
    base = optimizer.hyperparameters()
    for name in base.used():
        value = True if name == "maximize" else 0.123
        changed = optimizer.override(base, {name: value}, "begin")
        assert changed == dataclasses.replace(base, **{name: value}) != base
        for synonym in [own for own, contract in CONTRACT.items() if contract == name and hasattr(optimizer, own)]:
            assert optimizer.override(base, {synonym: value}, "begin") == changed


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_number_may_be_overridden(kind: type[Optimizer]) -> None:
    optimizer = kind()
    base = optimizer.hyperparameters()
    for name in (set(OVERRIDABLE) | set(OTHER) | {"betas", "made_up"}) - set(base.used()):
        if name in CONTRACT and hasattr(optimizer, name) or name == "betas" and base.beta1 is not None:
            continue
        error = refusal(lambda name=name: optimizer.override(base, {name: 0.25}, "begin.hyperparameters"))
        assert error.metadata == {"field": f"begin.hyperparameters.{CONTRACT.get(name, name)}"} or name in CONTRACT
        assert "use one of: " in str(error)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(kind(), "betas")])
def test_betas_may_be_overridden_together(kind: type[Optimizer]) -> None:
    base = kind().hyperparameters()
    assert kind().override(base, {"betas": (0.1, 0.2)}, "begin") == dataclasses.replace(base, beta1=0.1, beta2=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_overrides_are_checked_by_their_path(kind: type[Optimizer]) -> None:
    error = refusal(lambda: kind().override(kind().hyperparameters(), {"lr": -1.0}, "begin.groups[2]"))
    assert error.metadata == {"field": "begin.groups[2].lr"}
    assert "lr is -1.0; it must be finite and >= 0" in str(error)


# --- the table of rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [("adadelta", "rho", 1.0), ("adagrad", "lr_decay", -1.0), ("nadam", "momentum_decay", -1.0)],
)
def test_a_number_is_called_what_its_rule_calls_it(rule: str, name: str, value: float) -> None:
    """And not the contract's name, which is one for the numbers of several rules."""
    with pytest.raises(InvalidRequestError, match=rf"^optimizer\.{name}: {name} is {value}; it must be") as raised:
        OPTIMIZERS[rule](**{name: value})
    assert raised.value.metadata["field"] == f"optimizer.{name}"
    optimizer = OPTIMIZERS[rule]()
    with pytest.raises(InvalidRequestError, match=rf"^step\.{name}: {name} is {value}; it must be"):
        optimizer.override(optimizer.hyperparameters(), {name: value}, "step")


def test_every_rule_has_its_record() -> None:
    assert [kind.rule for kind in OPTIMIZERS.values()] == list(OPTIMIZERS)
    kinds = {
        value
        for value in vars(stepwire.optimizers).values()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    assert kinds == set(KINDS)
    assert AdamW.rule == "adam" and OPTIMIZERS["adam"] is not AdamW


def test_public_names_are_there_and_sorted_as_ruff_has_them() -> None:
    assert all(hasattr(stepwire.optimizers, name) for name in stepwire.optimizers.__all__)
    assert len(set(stepwire.optimizers.__all__)) == len(stepwire.optimizers.__all__)


# --- step sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "largest"),
    [
        (SGD(), LARGEST_NUMBER),
        (Adam(betas=(0.0, 0.9)), LARGEST_NUMBER),
        (Adam(betas=(0.75, 0.9)), LARGEST_NUMBER / 4),
        (AdamW(betas=(0.5, 0.9), weight_decay=4.0), LARGEST_NUMBER / 8),
        (LAMB(betas=(0.5, 0.9), weight_decay=0.5), LARGEST_NUMBER / 2),
    ],
)
def test_a_learning_rate_is_refused_where_a_step_size_is_beyond_float32(optimizer: Optimizer, largest: float) -> None:
    """The factor of the first update of Adam is lr / (1 − β1), and that of the decay lr·λ."""
    base = optimizer.hyperparameters()
    assert optimizer.largest_lr(base) == largest
    assert optimizer.override(base, {"lr": largest}, "begin").lr == largest
    if largest < LARGEST_NUMBER:
        error = refusal(lambda: optimizer.override(base, {"lr": largest * 1.01}, "begin.hyperparameters[0]"))
        assert error.metadata == {"field": "begin.hyperparameters[0].lr"}
        assert f"up to lr = {largest:.3g} alone" in str(error)
        refusal(lambda: dataclasses.replace(optimizer, lr=largest * 1.01))  # type: ignore[call-arg]
