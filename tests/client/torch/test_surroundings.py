"""Steps in other surroundings: default devices and dtypes, compiled functions, threads, helpers of torch."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from tests.client.torch.twins import assert_same_bits, gradients, parameters


def test_under_another_default_device(remote: Any) -> None:
    """Users call `torch.set_default_device("cuda")`; the device "meta" has no values at all."""
    params = [*parameters(), Parameter(gradients([(3, 2)], 0)[0].t())]
    twins = [Parameter(parameter.detach().clone()) for parameter in params]
    for parameter, twin in zip(params, twins, strict=True):
        parameter.grad = (
            torch.ones_like(parameter).t().contiguous().t() if parameter.dim() == 2 else torch.ones_like(parameter)
        )
        twin.grad = parameter.grad.clone()
    with torch.device("meta"):
        optimizer = remote("NAdam", params)
        optimizer.step()
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
    assert {value.device.type for entry in state["state"].values() for value in entry.values()} == {"cpu"}
    expected = remote("NAdam", twins)
    expected.step()
    assert_same_bits(params, twins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_under_another_default_dtype(dtype: torch.dtype, remote: Any) -> None:
    """Users of large models set bfloat16 as default, which cannot count to 257."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        params, theirs = parameters(), parameters()
        optimizer, local = remote("NAdam", params), torch.optim.NAdam(theirs)
        for step in range(1, 4):
            for tensors in (params, theirs):
                for parameter, gradient in zip(tensors, gradients([p.shape for p in tensors], step), strict=True):
                    parameter.grad = gradient
            optimizer.step()
            local.step()
        state = optimizer.state_dict()["state"]
        for index, parameter in enumerate(theirs):
            for key, value in local.state[parameter].items():
                assert (key, state[index][key].dtype) == (key, value.dtype)
        torch.testing.assert_close(state[0]["mu_product"], local.state[theirs[0]]["mu_product"])
    finally:
        torch.set_default_dtype(before)


def test_in_a_compiled_training_step(remote: Any) -> None:
    """The graph breaks there, as at anything that is not torch's."""
    parameter = Parameter(torch.ones(3))
    optimizer = remote("SGD", [parameter], lr=0.5)

    @torch.compile(backend="eager")
    def train(x: Any) -> None:
        ((parameter - x) ** 2).sum().div(2).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        train(torch.zeros(3))
    assert (parameter.tolist(), optimizer.applied_step) == ([0.125] * 3, 3)


def test_under_no_grad(remote: Any) -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = remote("SGD", [parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    with torch.no_grad():
        optimizer.step()
    assert parameter.tolist() == [-1.0] * 3
    assert parameter.requires_grad


def test_from_several_threads_steps_are_applied_one_by_one(remote: Any) -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = remote("SGD", [parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: optimizer.step(), range(20)))
    assert (optimizer.applied_step, parameter.tolist()) == (20, [-20.0] * 3)


def test_memory_of_numpy_and_leaves_that_are_no_parameters(remote: Any) -> None:
    array = np.ones(3, np.float32)
    leaf = torch.from_numpy(array).requires_grad_()
    optimizer = remote("SGD", [leaf], lr=0.25)
    (leaf.sum() * 2).backward()
    optimizer.step()
    assert array.tolist() == [0.5] * 3


def test_averages_of_weights_and_parametrizations(remote: Any) -> None:
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = remote("SGD", model.named_parameters(), lr=0.5)
    assert "parametrizations.weight.original0" in optimizer.session.shapes
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append(model.bias.detach().clone())
    torch.testing.assert_close(average.module.bias, torch.stack(seen).mean(0))


def test_a_model_in_memory_that_processes_share(remote: Any) -> None:
    """As Hogwild has it: other processes see the step."""
    model = torch.nn.Linear(2, 1, bias=False).share_memory()
    optimizer = remote("SGD", model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.is_shared()
    torch.testing.assert_close(model.weight.detach(), before - 1.0)
