"""Records to messages and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import (
    LARS,
    OPTIMIZERS,
    OVERRIDABLE,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Hyperparameters,
    NAdam,
    Optimizer,
    RMSprop,
)
from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from stepwire.wire import messages as wire

NUMBERS = Adam(lr=0.25, betas=(0.5, 0.75), eps=0.125, weight_decay=0.0625, maximize=True).hyperparameters()


ADAM = Adam()


def adam(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM, **fields)


@pytest.mark.parametrize("name", wire.FORMULAS)
def test_a_formula_goes_both_ways(name: wire.Formula) -> None:
    decoded = wire.optimizer_from_wire(adam(formula=wire.FORMULAS[name]), "f")
    assert decoded == Adam(formula=name)
    assert wire.optimizer_to_wire(decoded).formula == wire.FORMULAS[name]


def test_every_formula_of_the_contract_has_a_name() -> None:
    assert set(wire.FORMULAS.values()) | {optimizer_pb2.FORMULA_UNSPECIFIED} == set(optimizer_pb2.Formula.values())


def test_an_unspecified_formula_is_torchs() -> None:
    assert wire.optimizer_from_wire(adam(formula=optimizer_pb2.FORMULA_UNSPECIFIED), "f") == Adam(formula="torch")


def test_an_unknown_formula_is_refused_with_its_value() -> None:
    with pytest.raises(InvalidRequestError, match="77 is unknown") as refused:
        wire.optimizer_from_wire(adam(formula=77), "config.optimizer")
    assert refused.value.metadata == {"field": "config.optimizer.formula"}


OPTIONS: dict[str, Optimizer] = {
    "amsgrad": Adam(lr=0.5, amsgrad=True),
    "corrected amsgrad": Adam(formula="optax", amsgrad="corrected", eps_root=0.25),
    "nesterov Adam": Adam(formula="optax", nesterov=True),
    "AdamW": AdamW(weight_decay=0.5, formula="keras"),
    "NAdam": NAdam(momentum_decay=0.125, decoupled_weight_decay=True),
    "nesterov SGD": SGD(momentum=0.75, nesterov=True),
    "dampened SGD": SGD(momentum=0.75, dampening=0.5),
    "RMSprop": RMSprop(alpha=0.5, centered=True, momentum=0.25),
    "Adagrad": Adagrad(lr_decay=0.5, initial_accumulator_value=0.25),
    "Adadelta": Adadelta(rho=0.5),
    "LARS": LARS(trust_coefficient=0.5, nesterov=True),
}


@pytest.mark.parametrize("optimizer", [*OPTIONS.values(), *(kind() for kind in OPTIMIZERS.values())])
def test_an_optimizer_goes_both_ways(optimizer: Optimizer) -> None:
    assert wire.optimizer_from_wire(wire.optimizer_to_wire(optimizer), "optimizer") == optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS.values())
def test_an_optimizer_that_says_only_its_rule_has_the_published_defaults(kind: type[Optimizer]) -> None:
    rule = optimizer_pb2.Rule.Value(f"RULE_{kind.rule.upper()}")
    assert wire.optimizer_from_wire(optimizer_pb2.Optimizer(rule=rule), "optimizer") == kind()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (optimizer_pb2.Optimizer(), "rule"),
        (optimizer_pb2.Optimizer(rule=40), "rule"),  # type: ignore[arg-type]
        (adam(nesterov=True), "nesterov"),
        (adam(centered=True), "centered"),
        (adam(initial_accumulator_value=0.0), "initial_accumulator_value"),
        (adam(amsgrad=optimizer_pb2.AMSGRAD_CORRECTED), "amsgrad"),
        (adam(amsgrad=9), "amsgrad"),
        (adam(hyperparameters=optimizer_pb2.Hyperparameters(momentum=0.5)), "hyperparameters.momentum"),
        (adam(hyperparameters=optimizer_pb2.Hyperparameters(beta1=1.0)), "hyperparameters.beta1"),
        (optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_SGD, amsgrad=optimizer_pb2.AMSGRAD_RAW), "amsgrad"),
        (optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_SGD, formula=optimizer_pb2.FORMULA_KERAS), "formula"),
        (optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_LION, decoupled_weight_decay=True), "decoupled_weight_decay"),
        (
            optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAGRAD, initial_accumulator_value=-1.0),
            "initial_accumulator_value",
        ),
    ],
)
def test_an_option_that_a_rule_does_not_have_is_refused_by_its_field(
    message: optimizer_pb2.Optimizer, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        wire.optimizer_from_wire(message, "config.optimizer")
    assert refused.value.metadata == {"field": f"config.optimizer.{field}"}
    assert str(refused.value).startswith(f"config.optimizer.{field}: ")


def test_all_numbers_go_both_ways() -> None:
    assert wire.hyperparameters_from_wire(wire.hyperparameters_to_wire(NUMBERS)) == NUMBERS


def test_encoded_numbers_are_all_set_zeros_too() -> None:
    """Unset means "as before" on the wire, so a zero that was meant has to be there."""
    zeros = Hyperparameters(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    message = wire.hyperparameters_to_wire(zeros)
    assert {field.name for field, _ in message.ListFields()} == {*zeros.used(), "maximize"}
    assert wire.overrides_from_wire(message) == {name: getattr(zeros, name) for name in zeros.used()}
    assert set(zeros.used()) == {"lr", "beta1", "beta2", "eps", "weight_decay", "maximize"}
    every = Hyperparameters(**dict.fromkeys(OVERRIDABLE, 0.0) | {"maximize": False})  # type: ignore[arg-type]
    assert wire.overrides_from_wire(wire.hyperparameters_to_wire(every)) == dataclasses.asdict(every)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {}),
        ({"lr": 0.0}, {"lr": 0.0}),
        ({"betas": (0.1, 0.2)}, {"beta1": 0.1, "beta2": 0.2}),
        ({"beta2": 0.3, "maximize": False}, {"beta2": 0.3, "maximize": False}),
        ({"eps": 1, "weight_decay": 0}, {"eps": 1.0, "weight_decay": 0.0}),
    ],
)
def test_only_what_is_overridden_is_sent(overrides: dict[str, object], expected: dict[str, object]) -> None:
    assert wire.overrides_from_wire(wire.overrides_to_wire(ADAM, NUMBERS, overrides, "f")) == expected


@pytest.mark.parametrize(
    ("overrides", "field"), [({"momentum": 0.9}, "f.momentum"), ({"lr": -1.0}, "f.lr"), ({"betas": 0.9}, "f.betas")]
)
def test_a_wrong_override_is_refused_before_it_is_sent(overrides: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        wire.overrides_to_wire(ADAM, NUMBERS, overrides, "f")
    assert refused.value.metadata == {"field": field}


@pytest.mark.parametrize(
    ("optimizer", "own", "contracts"),
    [(Adadelta(), "rho", "alpha"), (Adagrad(), "lr_decay", "decay"), (NAdam(), "momentum_decay", "decay")],
)
def test_an_override_may_have_the_constructors_name_or_the_contracts(
    optimizer: Optimizer, own: str, contracts: str
) -> None:
    base = optimizer.hyperparameters()
    for name in (own, contracts):
        message = wire.overrides_to_wire(optimizer, base, {name: 0.25}, "f")
        assert wire.overrides_from_wire(message) == {contracts: 0.25}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("formula", ["torch", "no_bias_correction"])
def test_an_optimizer_is_sent_whole(formula: wire.Formula, amsgrad: bool) -> None:
    message = wire.optimizer_to_wire(AdamW(lr=0.5, amsgrad=amsgrad, formula=formula))
    expected = optimizer_pb2.Optimizer(
        rule=optimizer_pb2.RULE_ADAM,
        formula=wire.FORMULAS[formula],
        amsgrad=optimizer_pb2.AMSGRAD_RAW if amsgrad else optimizer_pb2.AMSGRAD_NONE,
        decoupled_weight_decay=True,
        hyperparameters=optimizer_pb2.Hyperparameters(
            lr=0.5,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8 if formula == "torch" else 1e-6,
            weight_decay=1e-2,
            maximize=False,
        ),
    )
    assert message == expected


@given(st.lists(st.tuples(st.text(max_size=9), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2)), max_size=9))
def test_a_layout_goes_both_ways(tensors: list[tuple[str, list[int], int]]) -> None:
    layout = place([TensorSpec(name, tuple(shape), group) for name, shape, group in tensors], 3)
    message = wire.layout_to_wire(layout, ("param", "exp_avg"))
    assert wire.layout_from_wire(message) == layout
    assert list(message.slots) == ["param", "exp_avg"]


def test_the_alignment_of_blocks_goes_both_ways() -> None:
    layout = place([TensorSpec("a", (5,)), TensorSpec("w", (5000,), state_precision="int8")], 1)
    assert wire.layout_from_wire(wire.layout_to_wire(layout, ("param",))) == layout
    assert wire.layout_from_wire(tensor_pb2.Layout()).chunk_alignment == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", wire.PRECISIONS)
def test_a_spec_goes_both_ways(frozen: bool, precision: str) -> None:
    spec = TensorSpec("layer/weight", (3, 0, 2), 4, frozen, precision)
    assert wire.spec_from_wire(wire.spec_to_wire(spec)) == spec


@pytest.mark.parametrize(
    ("own", "group", "session", "expected"),
    [
        (0, 0, 0, "float32"),
        (0, 0, 3, "int8"),
        (0, 2, 3, "bfloat16"),
        (1, 2, 3, "float32"),
        (3, 0, 0, "int8"),
    ],
)
def test_a_precision_is_the_tensors_or_its_groups_or_the_sessions(
    own: int, group: int, session: int, expected: str
) -> None:
    config = session_pb2.SessionConfig(
        tensors=[tensor_pb2.TensorSpec(name="w", group=1, state_precision=own)],
        groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(state_precision=group)],
        state_precision=session,
    )
    (spec,) = wire.specs_from_wire(config)
    assert spec.state_precision == wire.precision_from_wire(own, group, session) == expected
