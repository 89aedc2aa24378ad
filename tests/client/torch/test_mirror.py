"""The session's masters of a model with fewer bits, through loads, changes, overflows and moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tests.client.torch.twins import assert_same_bits, gradients, parameters, same_bits

HALVES = [torch.bfloat16, torch.float16]


def advance(optimizer: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(
            params, gradients([p.shape for p in params], step, params[0].dtype), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()


def masters(optimizer: Any) -> list[Any]:
    return list(optimizer.state_dict()["stepwire"]["masters"].values())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_have_more_bits_than_the_model(dtype: torch.dtype, remote: Any) -> None:
    params = parameters(dtype=dtype)
    optimizer = remote("Adam", params, lr=1e-4)
    advance(optimizer, params, range(1, 4))
    found = masters(optimizer)
    assert_same_bits([master.to(dtype) for master in found], [parameter.detach() for parameter in params])
    assert any(not torch.equal(master, parameter.float()) for master, parameter in zip(found, params, strict=True))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["same structure", "another structure"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_checkpoint_of_model_and_optimizer_has_every_bit(
    dtype: torch.dtype, amsgrad: bool, order: str, remote: Any
) -> None:
    straight, params = parameters(dtype=dtype), parameters(dtype=dtype)
    advance(remote("Adam", straight, lr=1e-3, amsgrad=amsgrad), straight, range(1, 9))
    first = remote("Adam", params, lr=1e-3, amsgrad=amsgrad)
    advance(first, params, range(1, 5))
    model, saved = [parameter.detach().clone() for parameter in params], first.state_dict()
    first.close()
    fresh = [Parameter(torch.zeros_like(values)) for values in model]
    second = remote("Adam", fresh, lr=1e-3)
    if order == "optimizer first":
        second.load_state_dict(saved)
    with torch.no_grad():
        for parameter, values in zip(fresh, model, strict=True):
            parameter.copy_(values)
    if order == "model first":
        second.load_state_dict(saved)
    assert_same_bits(masters(second), saved["stepwire"]["masters"].values())
    advance(second, fresh, range(5, 9))
    assert_same_bits(fresh, straight)


def test_masters_of_another_model_are_refused(remote: Any) -> None:
    """The model is the truth: where it does not show a master rounded, that is not its master."""
    first, second = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer = remote("Adam", first, lr=1e-3)
    advance(optimizer, first, range(1, 4))
    with torch.no_grad():
        second[0].fill_(100.0)
    other = remote("Adam", second, lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(masters(other)[0], torch.full((33, 17), 100.0))
    assert torch.equal(second[0].detach(), torch.full((33, 17), 100.0, dtype=torch.bfloat16))


def test_a_group_more_keeps_masters(remote: Any) -> None:
    straight, params = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    alone, grown = remote("Adam", straight[:2], lr=1e-3), remote("Adam", params[:2], lr=1e-3)
    for optimizer, given in ((alone, straight), (grown, params)):
        advance(optimizer, given[:2], range(1, 5))
    grown.add_param_group({"params": params[2:]})
    for optimizer, given in ((alone, straight), (grown, params)):
        advance(optimizer, given[:2], range(5, 9))
    assert_same_bits(params[:2], straight[:2])
    assert same_bits(masters(grown)[0], masters(alone)[0])


def test_a_parameter_that_overflows_comes_back(remote: Any) -> None:
    """The master is 70,000, which rounds to Inf in float16; the model's value is unchanged, so the master stays."""
    parameter, other = (Parameter(torch.full((2,), 60_000.0, dtype=torch.float16)) for _ in range(2))
    optimizer = remote("SGD", [parameter, other], lr=10_000.0)
    seen = []
    for gradient in (-1.0, 1.0):
        parameter.grad = torch.full((2,), gradient, dtype=torch.float16)
        optimizer.step()
        with torch.no_grad():
            other.add_(-32.0)  # so that the model is sent again
        seen.append(parameter[0].item())
    assert seen == [float("inf"), 60_000.0]
    assert masters(optimizer)[1].tolist() == [60_000.0 - 64.0] * 2
