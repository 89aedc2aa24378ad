"""The rules that torch has not: in torch's manner, and equal to the session that they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.torch.rules import TORCH_RULES
from tests.client.torch.twins import assert_same_bits, gradients, parameters

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Lion", {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    ("LAMB", {"lr": 0.01, "weight_decay": 0.1, "trust_coefficient": 0.5}),
    ("LARS", {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
]


def advance(optimizer: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(params, gradients([p.shape for p in params], step), strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_steps_are_those_of_a_session(name: str, options: dict[str, Any], remote: Any, client: stepwire.Client) -> None:
    params = parameters()
    values_by_name = {str(index): parameter.detach().numpy().copy() for index, parameter in enumerate(params)}
    with client.create_session(values_by_name, optimizer=getattr(stepwire, name)(**options)) as session:
        for step in range(1, 5):
            drawn = gradients([parameter.shape for parameter in params], step)
            values_by_name = session.step({str(index): gradient.numpy() for index, gradient in enumerate(drawn)})
    advance(remote(name, params, **options), params, range(1, 5))
    for parameter, values in zip(params, values_by_name.values(), strict=True):
        np.testing.assert_array_equal(parameter.detach().numpy(), values)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_defaults_are_those_of_the_record(name: str, options: dict[str, Any], remote: Any) -> None:
    optimizer = remote(name, parameters())
    assert optimizer.session.config.optimizer == getattr(stepwire, name)()
    assert set(options) <= set(optimizer.defaults)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_schedulers_and_state_dicts_work(name: str, options: dict[str, Any], remote: Any) -> None:
    straight, params = parameters(), parameters()

    def made(tensors: list[Any]) -> tuple[Any, Any]:
        optimizer = remote(name, tensors, **options)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def run(optimizer: Any, scheduler: Any, tensors: list[Any], steps: range) -> None:
        for step in steps:
            advance(optimizer, tensors, range(step, step + 1))
            scheduler.step()

    optimizer, scheduler = made(straight)
    run(optimizer, scheduler, straight, range(1, 7))
    first, before = made(params)
    run(first, before, params, range(1, 4))
    second, after = made(params)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    run(second, after, params, range(4, 7))
    assert_same_bits(params, straight)
    assert second.param_groups[0]["lr"] == options["lr"] / 64


def test_every_rule_is_a_public_class_and_every_class_a_rule() -> None:
    others = {"LocalSGD", "Optimizer", "SparseAdam", "lr_scheduler", "swa_utils"}
    classes = {name for name in stepwire.torch.__all__ if not name.startswith("Remote")} - others
    assert classes == set(TORCH_RULES)
    assert {name: getattr(stepwire.torch, name).rule for name in classes} == TORCH_RULES
