"""Numbers that a user changes in the run act as in torch, and go with the state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.client.torch.twins import gradients, parameters, same_bits

EPS = torch.finfo(torch.float32).eps

Changes = Sequence[dict[str, Any]]
SGD: dict[str, Changes] = {
    "momentum later": [{"momentum": 0.0}, {}, {"momentum": 0.9}, {}, {}],
    "momentum with dampening later": [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.5}, {}, {}, {}],
    "a pause": [{"momentum": 0.9}, {}, {"momentum": 0.0}, {}, {"momentum": 0.5, "dampening": 0.3}, {}],
}
NADAM: dict[str, Changes] = {
    "betas": [{}, {"betas": (0.5, 0.9)}, {"betas": (0.0, 0.99)}, {"betas": (0.95, 0.9)}, {}],
    "momentum decay": [{"momentum_decay": 0.5}, {}, {"momentum_decay": 0.0}, {}, {"momentum_decay": 1e-3}],
}
CASES: list[tuple[str, dict[str, Any], Changes]] = [
    *(("SGD", {"lr": 0.05}, changes) for changes in SGD.values()),
    *(("NAdam", {"lr": 0.05}, changes) for changes in NADAM.values()),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}, [{}, {"momentum": 0.0}, {}, {"momentum": 0.5}, {}]),
    ("Adam", {"lr": 0.05}, [{"betas": betas} for betas in ((0.9, 0.99), (0.0, 0.9), (0.0, 0.0), (0.9, 0.99))]),
]
IDS = [*(f"SGD, {name}" for name in SGD), *(f"NAdam, {name}" for name in NADAM), "RMSprop, a pause", "Adam, betas of 0"]


def groups(name: str, params: list[Any]) -> list[dict[str, Any]]:
    """Put the last parameter into a group whose numbers stay; of SGD with momentum, so that there are buffers."""
    stays = {"momentum": 0.9} if name == "SGD" else {}
    return [{"params": params[:-1]}, {"params": params[-1:], **stays}]


def train(optimizer: Any, params: list[Any], changes: Changes, after: Callable[[Any], Any] | None = None) -> Any:
    """Step once a change of the first group; the second parameter has a gradient only in odd steps."""
    for step, change in enumerate(changes, start=1):
        optimizer.param_groups[0].update(change)
        drawn = gradients([parameter.shape for parameter in params], step)
        for place, (parameter, gradient) in enumerate(zip(params, drawn, strict=True)):
            parameter.grad = None if place == 1 and step % 2 == 0 else gradient
        optimizer.step()
        optimizer = optimizer if after is None else after(optimizer)
    return optimizer


@pytest.mark.parametrize(("name", "options", "changes"), CASES, ids=IDS)
def test_numbers_changed_in_the_run_act_as_in_torch(
    name: str, options: dict[str, Any], changes: Changes, remote: Any
) -> None:
    """In one session, and with the state taken through torch's optimizer of the same name after each step."""
    ours, theirs, moved = parameters(), parameters(), parameters()
    train(remote(name, groups(name, ours), **options), ours, changes)
    train(getattr(torch.optim, name)(groups(name, theirs), **options), theirs, changes)

    def through_torch(optimizer: Any) -> Any:
        local = getattr(torch.optim, name)(groups(name, moved), **options)
        local.load_state_dict(optimizer.state_dict())
        optimizer.close()
        again = remote(name, groups(name, moved), **options)
        again.load_state_dict(local.state_dict())
        return again

    train(remote(name, groups(name, moved), **options), moved, changes, through_torch)
    for one, other, third in zip(theirs, ours, moved, strict=True):
        torch.testing.assert_close(other, one, rtol=16 * EPS, atol=16 * EPS)
        torch.testing.assert_close(third, one, rtol=16 * EPS, atol=16 * EPS)


@pytest.mark.parametrize(("name", "options", "changes"), CASES, ids=IDS)
def test_a_state_of_changed_numbers_goes_on_in_every_bit(
    name: str, options: dict[str, Any], changes: Changes, remote: Any
) -> None:
    straight, moved = parameters(), parameters()
    train(remote(name, groups(name, straight), **options), straight, changes)

    def through_a_state_dict(optimizer: Any) -> Any:
        saved = optimizer.state_dict()
        optimizer.close()
        again = remote(name, groups(name, moved), **options)
        again.load_state_dict(saved)
        return again

    train(remote(name, groups(name, moved), **options), moved, changes, through_a_state_dict)
    assert all(same_bits(one, other) for one, other in zip(straight, moved, strict=True))


def test_a_new_group_leaves_the_buffers_of_the_others(remote: Any) -> None:
    """The session is another one then, with the state of the old one."""
    ours, theirs = parameters(), parameters()
    for params, make in ((ours, functools.partial(remote, "SGD")), (theirs, torch.optim.SGD)):
        optimizer = make([{"params": params[:1]}, {"params": params[1:2], "momentum": 0.9}], lr=0.1)
        train(optimizer, params[:2], [{}])
        optimizer.add_param_group({"params": params[2:], "momentum": 0.5, "dampening": 0.5})
        train(optimizer, params, [{}, {"momentum": 0.9, "dampening": 0.5}, {}])
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=8 * EPS, atol=8 * EPS)
