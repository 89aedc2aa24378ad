"""Records to messages and back."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire import wire
from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import OVERRIDABLE, Adam, AdamW, Hyperparameters
from stepwire.v1 import optimizer_pb2

NUMBERS = Adam(lr=0.25, betas=(0.5, 0.75), eps=0.125, weight_decay=0.0625, maximize=True).hyperparameters()


@pytest.mark.parametrize("name", wire.FORMULAS)
def test_a_formula_goes_both_ways(name: wire.Formula) -> None:
    assert wire.formula_from_wire(wire.FORMULAS[name]) == name


def test_every_formula_of_the_contract_has_a_name() -> None:
    assert set(wire.FORMULAS.values()) | {optimizer_pb2.FORMULA_UNSPECIFIED} == set(optimizer_pb2.Formula.values())


def test_an_unspecified_formula_is_torchs() -> None:
    assert wire.formula_from_wire(0) == "torch"


def test_an_unknown_formula_is_refused_with_its_value() -> None:
    with pytest.raises(InvalidRequestError, match="77 is unknown") as refused:
        wire.formula_from_wire(77)
    assert refused.value.metadata == {"field": "config.optimizer.formula"}


def test_all_numbers_go_both_ways() -> None:
    assert wire.hyperparameters_from_wire(wire.hyperparameters_to_wire(NUMBERS)) == NUMBERS


def test_encoded_numbers_are_all_set_zeros_too() -> None:
    """Unset means "as before" on the wire, so a zero that was meant has to be there."""
    zeros = Hyperparameters(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    message = wire.hyperparameters_to_wire(zeros)
    assert {field.name for field, _ in message.ListFields()} == set(OVERRIDABLE)
    assert wire.overrides_from_wire(message) == dataclasses.asdict(zeros)


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
    assert wire.overrides_from_wire(wire.overrides_to_wire(NUMBERS, overrides, "f")) == expected


@pytest.mark.parametrize(
    ("overrides", "field"), [({"momentum": 0.9}, "f.momentum"), ({"lr": -1.0}, "f.lr"), ({"betas": 0.9}, "f.betas")]
)
def test_a_wrong_override_is_refused_before_it_is_sent(overrides: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        wire.overrides_to_wire(NUMBERS, overrides, "f")
    assert refused.value.metadata == {"field": field}


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
            lr=0.5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, maximize=False
        ),
    )
    assert message == expected


@given(st.lists(st.tuples(st.text(max_size=9), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2)), max_size=9))
def test_a_layout_goes_both_ways(tensors: list[tuple[str, list[int], int]]) -> None:
    layout = place([TensorSpec(name, tuple(shape), group) for name, shape, group in tensors], 3)
    message = wire.layout_to_wire(layout, ("param", "exp_avg"))
    assert wire.layout_from_wire(message) == layout
    assert list(message.slots) == ["param", "exp_avg"]


def test_a_spec_goes_both_ways() -> None:
    spec = TensorSpec("layer/weight", (3, 0, 2), 4)
    assert wire.spec_from_wire(wire.spec_to_wire(spec)) == spec
