"""The server's rule for each rule of torch, compared with torch's own groups and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepwire.errors import InvalidRequestError
from stepwire.torch.rules import TORCH_RULES

# Names of torch's groups that say how torch computes, and nothing of the outcome.
HOW = {"foreach", "fused", "capturable", "differentiable", "params"}
IN_TORCH = sorted(name for name in TORCH_RULES if hasattr(torch.optim, name))


def group(name: str, **options: Any) -> dict[str, Any]:
    made: dict[str, Any] = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2))], **options).param_groups[0]
    return made


@pytest.mark.parametrize("name", IN_TORCH)
def test_nothing_in_torchs_groups_is_left_out(name: str) -> None:
    """A number that a new release adds must be sent, or refused; ignoring it would be another optimizer."""
    rule = TORCH_RULES[name]
    assert set(group(name)) - HOW == {*rule.numbers, *rule.structure}


@pytest.mark.parametrize("name", IN_TORCH)
def test_the_record_has_torchs_defaults(name: str) -> None:
    theirs, ours = group(name), TORCH_RULES[name].optimizer_for([group(name)])
    assert ours == TORCH_RULES[name].optimizer(**{key: value for key, value in theirs.items() if key not in HOW})


@pytest.mark.parametrize("name", IN_TORCH)
def test_the_slots_are_torchs_state(name: str) -> None:
    rule, parameter = TORCH_RULES[name], torch.nn.Parameter(torch.ones(2))
    options = {
        key: value
        for key, value in {"amsgrad": True, "momentum": 0.9, "centered": True}.items()
        if key in rule.numbers or key in rule.structure
    }
    optimizer = getattr(torch.optim, name)([parameter], **options)
    assert (len(optimizer.state[parameter]) > 0) == rule.eager
    parameter.grad = torch.ones(2)
    optimizer.step()
    counted = {"step"} if rule.counts else set()
    kept = set(optimizer.state[parameter]) - {"mu_product"}
    assert kept == {*rule.slots, *counted}


def test_tensors_among_the_numbers_become_plain() -> None:
    numbers = TORCH_RULES["Adam"].numbers_of(
        group("Adam", lr=torch.tensor(0.5), betas=(torch.tensor(0.5), torch.tensor([0.25])))
    )
    assert (numbers["lr"], numbers["betas"], numbers["maximize"]) == (0.5, (0.5, 0.25), False)
    assert [type(value) for value in (numbers["lr"], *numbers["betas"])] == [float] * 3


def test_dampening_without_momentum_is_none_as_in_torch() -> None:
    rule = TORCH_RULES["SGD"]
    assert rule.numbers_of(group("SGD", dampening=0.5))["dampening"] == 0.0
    assert rule.numbers_of(group("SGD", momentum=0.9, dampening=0.5))["dampening"] == 0.5


def test_groups_that_differ_in_structure() -> None:
    groups = [group("RMSprop"), group("RMSprop", centered=True)]
    with pytest.raises(
        InvalidRequestError, match=r"param_groups\[1\]\['centered'\] is True and param_groups\[0\]\['centered'\] False"
    ):
        TORCH_RULES["RMSprop"].structure_of(groups)


def test_groups_of_older_torch_lack_some_structure() -> None:
    old = {key: value for key, value in group("Adam").items() if key != "decoupled_weight_decay"}
    assert TORCH_RULES["Adam"].structure_of([old]) == {"amsgrad": False, "decoupled_weight_decay": False}
    assert TORCH_RULES["AdamW"].structure_of([old]) == {"amsgrad": False, "decoupled_weight_decay": True}


@pytest.mark.parametrize(
    ("name", "momenta", "kept"), [("SGD", (0.0, 0.0), False), ("SGD", (0.0, 0.9), True), ("Adam", (0.0, 0.0), None)]
)
def test_whether_momentum_is_kept(name: str, momenta: tuple[float, float], kept: bool | None) -> None:
    assert TORCH_RULES[name].keeps_momentum([{**group(name), "momentum": value} for value in momenta]) is kept
