"""Adam's formulas: their own defaults, and contradictory options."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Adam, Adamax, AdamW, Formula, Hyperparameters, NAdam, RAdam

FORMULAS = get_args(Formula)


def test_adams_defaults_are_torchs() -> None:
    assert Adam().hyperparameters() == Hyperparameters(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    assert dataclasses.asdict(Adam()) == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "maximize": False,
        "eps": 1e-8,
        "amsgrad": False,
        "decoupled_weight_decay": False,
        "formula": "torch",
        "nesterov": False,
        "eps_root": 0.0,
    }


def test_adamw_is_adam_with_decoupled_decay() -> None:
    assert dataclasses.asdict(AdamW()) == dataclasses.asdict(Adam(weight_decay=1e-2, decoupled_weight_decay=True))


@pytest.mark.parametrize(
    ("formula", "eps", "decay"),
    [
        ("torch", 1e-8, 1e-2),
        ("keras", 1e-7, 4e-3),
        ("optax", 1e-8, 1e-4),
        ("no_bias_correction", 1e-6, 1e-2),
        ("decay_after", 1e-8, 1e-2),
    ],
)
def test_every_formula_brings_its_own_defaults(formula: Formula, eps: float, decay: float) -> None:
    assert (Adam(formula=formula).eps, Adam(formula=formula).weight_decay) == (eps, 0.0)
    assert (AdamW(formula=formula).eps, AdamW(formula=formula).weight_decay) == (eps, decay)
    chosen = AdamW(formula=formula, eps=0.0, weight_decay=0.0)
    assert (chosen.eps, chosen.weight_decay) == (0.0, 0.0), "zero is a value, not a gap"
    assert Adam(formula=formula).structure().formula == formula


def test_defaults_of_the_relatives_are_torchs() -> None:
    assert (NAdam().lr, NAdam().betas, NAdam().eps, NAdam().momentum_decay) == (2e-3, (0.9, 0.999), 1e-8, 4e-3)
    assert (RAdam().lr, RAdam().betas, RAdam().eps) == (1e-3, (0.9, 0.999), 1e-8)
    assert (Adamax().lr, Adamax().betas, Adamax().eps) == (2e-3, (0.9, 0.999), 1e-8)
    assert {NAdam().weight_decay, RAdam().weight_decay, Adamax().weight_decay} == {0.0}


# --- contradictory options --------------------------------------------------------------------------------


def refused(field: str, kind: type[Adam] = Adam, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as error:
        kind(**options)
    assert error.value.metadata == {"field": field}
    return str(error.value)


AMSGRADS = {
    "torch": {False: "none", True: "raw"},
    "keras": {False: "none", True: "raw"},
    "optax": {False: "none", "corrected": "corrected"},
    "no_bias_correction": {False: "none", True: "raw"},
    "decay_after": {False: "none"},
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_amsgrad_is_the_formulas_own(kind: type[Adam], formula: Formula) -> None:
    for amsgrad in (False, True, "corrected"):
        if amsgrad in AMSGRADS[formula]:
            assert kind(formula=formula, amsgrad=amsgrad).structure().amsgrad == AMSGRADS[formula][amsgrad]
        else:
            message = refused("optimizer.amsgrad", kind, formula=formula, amsgrad=amsgrad)
            assert f"amsgrad is {amsgrad!r} and the formula {formula!r}, which has only False" in message


def test_raw_is_another_word_for_true() -> None:
    assert Adam(amsgrad="raw") == Adam(amsgrad=True)
    assert "use False, True, 'raw' or 'corrected'" in refused("optimizer.amsgrad", amsgrad="both")


@pytest.mark.parametrize("formula", FORMULAS)
def test_nesterov_is_optaxs_without_amsgrad(formula: Formula) -> None:
    if formula == "optax":
        assert Adam(formula="optax", nesterov=True).structure().nesterov
        message = refused("optimizer.nesterov", formula="optax", nesterov=True, amsgrad="corrected")
    else:
        message = refused("optimizer.nesterov", formula=formula, nesterov=True)
    assert "formula='optax' and without amsgrad" in message and "NAdam" in message


@pytest.mark.parametrize("formula", FORMULAS)
def test_eps_root_is_optaxs(formula: Formula) -> None:
    if formula == "optax":
        numbers = Adam(formula="optax", eps_root=0.25).hyperparameters()
        assert numbers.eps_root == 0.25
        assert numbers.replace({"eps_root": 0.5}).eps_root == 0.5
        return
    assert "eps_root is 0.25; only formula='optax' has it" in refused(
        "optimizer.eps_root", formula=formula, eps_root=0.25
    )
    with pytest.raises(InvalidRequestError, match="'eps_root' is a hyper-parameter of other rules"):
        Adam(formula=formula).override(Adam(formula=formula).hyperparameters(), {"eps_root": 0.0}, "begin")


@pytest.mark.parametrize("formula", FORMULAS)
def test_l2_is_refused_where_the_formula_has_decoupled_decay_only(formula: Formula) -> None:
    if formula not in ("keras", "decay_after"):
        assert Adam(formula=formula, weight_decay=0.1).hyperparameters().weight_decay == 0.1
        return
    assert f"use AdamW(formula={formula!r}), or 0" in refused(
        "optimizer.weight_decay", formula=formula, weight_decay=0.1
    )
    plain, decoupled = Adam(formula=formula), AdamW(formula=formula)
    assert decoupled.override(decoupled.hyperparameters(), {"weight_decay": 0.5}, "begin").weight_decay == 0.5
    assert plain.override(plain.hyperparameters(), {"weight_decay": 0.0}, "begin").weight_decay == 0.0
    with pytest.raises(InvalidRequestError) as error:
        plain.override(plain.hyperparameters(), {"weight_decay": 0.5}, "begin.groups[0]")
    assert error.value.metadata == {"field": "begin.groups[0].weight_decay"}


def test_a_wrong_formula_is_refused_with_the_right_ones() -> None:
    assert "use one of: torch, keras, optax, no_bias_correction, decay_after" in refused(
        "optimizer.formula", formula="tensorflow"
    )
