"""Groups that are those of the step before: known by their objects, as long as none of those can change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepwire.torch.known_groups import KnownGroups
from tests.client.torch.twins import gradients, parameters


def group(**changes: Any) -> dict[str, Any]:
    return {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "foreach": None, "name": "a"} | changes


def test_the_same_groups_are_known_and_bring_what_was_found() -> None:
    known, groups = KnownGroups(), [group(), group(lr=0.2)]
    assert not known.are(groups)
    known.note(groups, [{}, {"lr": 0.2}])
    groups[0]["params"].append(1)
    assert known.are(groups)
    assert known.are([dict(each) for each in groups])
    assert known.overrides == [{}, {"lr": 0.2}]


@pytest.mark.parametrize("change", [{"lr": 0.3}, {"betas": (0.9, 0.98)}, {"amsgrad": True}, {"initial_lr": 0.1}])
def test_groups_with_another_number_are_not_known(change: dict[str, Any]) -> None:
    known, groups = KnownGroups(), [group(), group()]
    known.note(groups, None)
    groups[1].update(change)
    assert not known.are(groups)


@pytest.mark.parametrize("other", [[], [group()], [group(), group(), group()]])
def test_fewer_or_more_groups_are_not_known(other: list[dict[str, Any]]) -> None:
    known = KnownGroups()
    known.note([group(), group()], None)
    assert not known.are(other)


@pytest.mark.parametrize("value", [torch.tensor(0.1), [0.9, 0.99], (torch.tensor(0.9), 0.99), {"a": 1}])
def test_values_that_can_change_unseen_are_looked_at_each_time(value: Any) -> None:
    known, groups = KnownGroups(), [group(lr=value)]
    known.note(groups, None)
    assert not known.are(groups)


def test_a_rate_in_a_tensor_is_changed_in_place_as_with_torch(remote: Any) -> None:
    ours, theirs = parameters(), parameters()
    rates = [torch.tensor(0.05), torch.tensor(0.05)]
    optimizers = [remote("Adam", ours, lr=rates[0]), torch.optim.Adam(theirs, lr=rates[1])]
    for step in range(1, 6):
        for rate, optimizer, params in zip(rates, optimizers, (ours, theirs), strict=True):
            rate.fill_(0.05 / step)
            for parameter, drawn in zip(params, gradients([each.shape for each in params], step), strict=True):
                parameter.grad = drawn
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
