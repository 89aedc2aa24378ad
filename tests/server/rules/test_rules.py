"""Which rule an optimizer has, and that every option of it reaches the arithmetic."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import (
    LAMB,
    LARS,
    OPTIMIZERS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Hyperparameters,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from stepwire_server.rules import ALL_RULES, Decay, has_momentum, rule_for


@pytest.mark.parametrize(
    ("optimizer", "momentum", "name", "decay"),
    [
        (Adam(), False, "adam_torch", Decay.GRADIENT),
        (AdamW(amsgrad=True), False, "adam_torch_raw", Decay.BEFORE),
        (AdamW(formula="keras"), False, "adam_keras", Decay.APART),
        (Adam(formula="no_bias_correction"), False, "adam_no_bias_correction", Decay.GRADIENT),
        (Adam(formula="optax", amsgrad="corrected"), False, "adam_optax_corrected", Decay.GRADIENT),
        (Adam(formula="optax", nesterov=True), False, "adam_optax_nesterov", Decay.GRADIENT),
        (AdamW(formula="optax"), False, "adam_optax", Decay.WITHIN),
        (AdamW(formula="no_bias_correction"), False, "adam_no_bias_correction", Decay.WITHIN),
        (AdamW(formula="decay_after"), False, "adam_decay_after", Decay.AFTER),
        (NAdam(), False, "nadam", Decay.GRADIENT),
        (NAdam(decoupled_weight_decay=True), False, "nadam", Decay.BEFORE),
        (RAdam(), False, "radam", Decay.GRADIENT),
        (RAdam(decoupled_weight_decay=True), False, "radam", Decay.BEFORE),
        (Adamax(), False, "adamax", Decay.GRADIENT),
        (SGD(), False, "sgd", Decay.GRADIENT),
        (SGD(), True, "sgd_momentum", Decay.GRADIENT),
        (SGD(momentum=0.9), True, "sgd_momentum", Decay.GRADIENT),
        (SGD(momentum=0.9, nesterov=True), True, "sgd_nesterov", Decay.GRADIENT),
        (RMSprop(), False, "rmsprop", Decay.GRADIENT),
        (RMSprop(), True, "rmsprop_momentum", Decay.GRADIENT),
        (RMSprop(centered=True), False, "rmsprop_centered", Decay.GRADIENT),
        (RMSprop(centered=True), True, "rmsprop_centered_momentum", Decay.GRADIENT),
        (Adagrad(), False, "adagrad", Decay.GRADIENT),
        (Adadelta(), False, "adadelta", Decay.GRADIENT),
        (Lion(), False, "lion", Decay.WITHIN),
        (LAMB(), False, "lamb", Decay.NONE),
        (LARS(), True, "lars", Decay.NONE),
        (LARS(nesterov=True), True, "lars_nesterov", Decay.NONE),
    ],
    ids=str,
)
def test_every_optimizer_has_its_rule_and_its_place_of_decay(optimizer, momentum, name, decay) -> None:
    rule, place = rule_for(optimizer, momentum)
    assert (rule.name, place) == (name, decay)
    assert rule in ALL_RULES


def test_slots_are_named_as_torch_names_them() -> None:
    slots = {rule.name: rule.slots for rule in ALL_RULES}
    assert slots["adam_torch"] == ("exp_avg", "exp_avg_sq")
    assert slots["adam_torch_raw"] == slots["adam_optax_corrected"] == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert slots["adamax"] == ("exp_avg", "exp_inf")
    assert slots["rmsprop_centered_momentum"] == ("square_avg", "momentum_buffer", "grad_avg")
    assert (slots["adagrad"], slots["adadelta"]) == (("sum",), ("square_avg", "acc_delta"))
    assert (slots["sgd"], slots["sgd_momentum"], slots["lion"]) == ((), ("momentum_buffer",), ("exp_avg",))


def test_one_group_with_momentum_makes_a_buffer_for_all() -> None:
    groups = [Hyperparameters(lr=0.1, momentum=0.0), Hyperparameters(lr=0.1, momentum=0.5)]
    assert has_momentum(groups) and not has_momentum(groups[:1]) and not has_momentum([])
    assert not has_momentum([Hyperparameters(lr=0.1)])


@pytest.mark.parametrize("centered", [False, True])
def test_a_buffer_without_momentum_changes_nothing(centered, run, recipe_of) -> None:
    """A group without momentum beside one with it: b is g, or the quotient, itself."""
    random = np.random.default_rng(3)
    for optimizer in (SGD(lr=0.1), RMSprop(lr=0.1, centered=centered)):
        hyper = optimizer.hyperparameters()
        plain, buffered = (rule_for(optimizer, momentum)[0] for momentum in (False, True))
        p, g = random.standard_normal((2, 20))
        slots = {name: random.uniform(1.0, 2.0, 20) for name in buffered.slots}
        slots |= {"grad_avg": random.uniform(0.1, 0.2, 20)}
        for t in (1, 2):
            alone = plain.update(p, g, *[slots[name] for name in plain.slots], *plain.scalars(hyper, t))
            beside = buffered.update(p, g, *[slots[name] for name in buffered.slots], *buffered.scalars(hyper, t))
            np.testing.assert_allclose(beside[0], alone[0], rtol=1e-14)


# --- every option reaches the arithmetic ----------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "lr": 0.123,
    "betas": (0.123, 0.456),
    "eps": 0.123,
    "weight_decay": 0.123,
    "amsgrad": True,
    "formula": "keras",
    "eps_root": 0.123,
    "momentum": 0.123,
    "dampening": 0.123,
    "alpha": 0.123,
    "rho": 0.123,
    "lr_decay": 0.123,
    "momentum_decay": 0.123,
    "initial_accumulator_value": 0.123,
    "trust_coefficient": 0.123,
}
FIELDS = [(kind, field.name) for kind in (*OPTIMIZERS.values(), AdamW) for field in dataclasses.fields(kind)]


def companions(kind: type[Optimizer], name: str) -> dict[str, Any]:
    """Return options without which this one would be refused, or could not show."""
    if kind.rule == "adam" and name in ("nesterov", "eps_root"):
        return {"formula": "optax"}
    if kind.rule in ("sgd", "lars") and name in ("nesterov", "dampening"):
        return {"momentum": 0.5}
    return {"weight_decay": 0.1} if name == "decoupled_weight_decay" else {}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_option_changes_the_parameters(kind, name, run, gradients) -> None:
    """Nothing that a user sets is silently ignored. Four steps: at the second, torch begins to dampen and to decay."""
    others = companions(kind, name)
    plain = kind(**others)
    value = not getattr(plain, name) if isinstance(getattr(plain, name), bool) and name != "amsgrad" else OTHER[name]
    changed = kind(**others, **{name: value})
    start, grads = np.random.default_rng(1).standard_normal(23), gradients(8)
    grads[4:] /= 10.0
    moved = [run(optimizer, start, grads)[-1]["param"] for optimizer in (plain, changed)]
    assert np.isfinite(moved).all()
    assert not np.allclose(moved[0], moved[1], rtol=1e-9, atol=0.0)


# --- imports --------------------------------------------------------------------------------------------------


def test_rules_load_no_engine() -> None:
    script = (
        "import sys, stepwire_server.rules;"
        "print(sorted({'cupy', 'grpc', 'numba', 'stepwire_server.engines'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
