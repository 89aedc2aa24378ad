"""`import stepwire.torch as optim` in a script, and wrappers that other code puts around `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire.torch as optim
from stepwire.errors import UnsupportedFeatureError


def test_names_of_torchs_module(remote: Any) -> None:
    optimizer = remote("SGD", [Parameter(torch.zeros(2))], lr=1.0)
    assert isinstance(optimizer, optim.Optimizer)
    assert not isinstance(optimizer, optim.LBFGS)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optim.swa_utils.AveragedModel is torch.optim.swa_utils.AveragedModel
    with pytest.raises(AttributeError, match="module 'stepwire.torch' has no attribute 'Sgd'"):
        optim.Sgd  # noqa: B018


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Rprop"])
def test_a_class_that_is_not_served_says_why(name: str) -> None:
    refused = getattr(optim, name)
    assert issubclass(refused, torch.optim.Optimizer)
    assert refused is getattr(optim, name)
    with pytest.raises(
        UnsupportedFeatureError, match=rf"stepwire.torch.{name}: .*; use torch.optim.{name} for"
    ) as raised:
        refused([Parameter(torch.zeros(2))], lr=1.0)
    assert raised.value.metadata == {"field": "optimizer", "feature": f"torch_{name}"}


class Accelerated:
    """The part of accelerate's `AcceleratedOptimizer` that finds out whether a step was taken: it counts calls."""

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.step_was_skipped, self._called = False, False
        self._original = optimizer.step
        self._patched = self._patch(optimizer.step)

    def _patch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            self._called = True
            return method(*args, **kwargs)

        return patched

    def step(self) -> None:
        self.optimizer.step = self._patched
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step_was_skipped = not self._called
        self.optimizer.step = self._original
        self._called = False


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_a_step_that_was_left_out_is_noticed_by_a_wrapper(
    options: dict[str, Any], scheduled: bool, remote: Any
) -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = remote("SGD", [parameter], lr=1.0, **options)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1) if scheduled else None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapper = Accelerated(optimizer, scaler)
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        wrapper.step()
        skipped.append(wrapper.step_was_skipped)
        if scheduler is not None and not wrapper.step_was_skipped:
            scheduler.step()
    assert skipped == [False, True, False]
    assert optimizer.applied_step == 2
    expected = -2.0 if scheduler is None else -1.1
    assert parameter.tolist() == pytest.approx([expected] * 3)


def test_without_a_wrapper_the_server_unscales(remote: Any) -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = remote("SGD", [parameter], lr=1.0)
    optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert parameter.grad.tolist() == [4.0] * 3
    assert parameter.tolist() == [-1.0] * 3
