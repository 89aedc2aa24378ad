"""torch.amp.GradScaler, unmodified: the scale and the steps are torch's, with either unscaling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import stepwire
import stepwire.torch
from tests.client.torch.twins import Twins, assert_same_bits, gradients

BOUND = 4 * torch.finfo(torch.float32).eps
OVERFLOWS = {3, 4, 9}
"""Steps whose loss is infinite."""
STEPS = 14

Scaler = Any


def scaler(**options: Any) -> Scaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 3} | options)


def backward(params: list[Any], step: int, scaler: Scaler) -> None:
    """Compute gradients of a loss that is infinite in some steps: the parameters' product with random numbers."""
    for parameter, factor in zip(params, gradients([p.shape for p in params], step), strict=True):
        parameter.grad = None
        loss = (parameter * factor).sum() * (float("inf") if step in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()


def twins(rule: str, client: stepwire.Client, **ours: Any) -> Twins:
    return Twins(
        lambda params, remote_params: (
            getattr(torch.optim, rule)(params, lr=0.01),
            getattr(stepwire.torch, rule)(remote_params, lr=0.01, server=client, **ours),
        )
    )


@pytest.mark.parametrize("amp_scaling", [True, False], ids=["native", "unscaled-here"])
@pytest.mark.parametrize("rule", ["Adam", "SGD"])
def test_scale_and_steps_are_torchs(rule: str, amp_scaling: bool, client: stepwire.Client) -> None:
    pair = twins(rule, client, amp_scaling=amp_scaling)
    scalers = scaler(), scaler()
    scales = []
    with pair.remote:
        for step in range(1, STEPS + 1):
            before = [parameter.detach().clone() for parameter in pair.remote_params]
            for params, optimizer, one in zip(
                (pair.params, pair.remote_params), (pair.local, pair.remote), scalers, strict=True
            ):
                backward(params, step, one)
                one.step(optimizer)
                one.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
            scales.append(scalers[1].get_scale())
            if step in OVERFLOWS:
                assert_same_bits(pair.remote_params, before)
            pair.assert_close(rtol=BOUND, atol=BOUND, what=f"step {step}")
        assert pair.remote.applied_step == STEPS - len(OVERFLOWS)
    assert {after / before for before, after in itertools.pairwise(scales)} == {0.5, 1.0, 2.0}


def test_native_path_leaves_the_gradients_scaled(client: stepwire.Client) -> None:
    """The server divides, which saves a pass over the gradients here."""
    pair, one = twins("Adam", client), scaler()
    with pair.remote:
        backward(pair.remote_params, 1, one)
        scaled = [parameter.grad.clone() for parameter in pair.remote_params]
        one.step(pair.remote)
        assert_same_bits([parameter.grad for parameter in pair.remote_params], scaled)
        assert pair.remote.last_result.grad_norm == pytest.approx(
            torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in scaled])).item() / 2**10, rel=1e-6
        )


@pytest.mark.parametrize("amp_scaling", [True, False], ids=["native", "unscaled-here"])
def test_unscale_before_clipping(amp_scaling: bool, client: stepwire.Client) -> None:
    pair = twins("Adam", client, amp_scaling=amp_scaling)
    scalers = scaler(), scaler()
    with pair.remote:
        for step in range(1, STEPS + 1):
            norms = []
            for params, optimizer, one in zip(
                (pair.params, pair.remote_params), (pair.local, pair.remote), scalers, strict=True
            ):
                backward(params, step, one)
                one.unscale_(optimizer)
                norms.append(clip_grad_norm_(params, 0.5).item())
                one.step(optimizer)
                one.update()
            np.testing.assert_equal(norms[0], norms[1])
            pair.assert_close(rtol=BOUND, atol=BOUND, what=f"step {step}")
        assert pair.remote.last_result.grad_norm == pytest.approx(0.5, rel=1e-5)


def test_clipping_on_the_server_is_of_the_unscaled_gradient(client: stepwire.Client) -> None:
    pair = twins("Adam", client, clip_grad_norm=0.5)
    scalers = scaler(), scaler()
    with pair.remote:
        for step in range(1, STEPS + 1):
            backward(pair.params, step, scalers[0])
            scalers[0].unscale_(pair.local)
            clip_grad_norm_(pair.params, 0.5)
            backward(pair.remote_params, step, scalers[1])
            for optimizer, one in zip((pair.local, pair.remote), scalers, strict=True):
                one.step(optimizer)
                one.update()
            pair.assert_close(rtol=BOUND, atol=BOUND, what=f"step {step}")


def test_half_precision_gradients_are_unscaled_in_float32(remote: Any) -> None:
    """A value too small for float16 arrives scaled: 2⁻²⁶, a fourth of the smallest number of that type."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer, one = remote("SGD", [parameter], lr=2.0**20), scaler(init_scale=2.0**16)
    one.scale(torch.zeros(1))
    parameter.grad = torch.full((4,), 2.0**-10, dtype=torch.float16)  # 2⁻²⁶, scaled
    one.step(optimizer)
    one.update()
    assert parameter.tolist() == [-(2.0**-6)] * 4
    parameter.grad = torch.full((4,), float("inf"), dtype=torch.float16)
    one.step(optimizer)
    one.update()
    assert (one.get_scale(), optimizer.applied_step) == (2.0**15, 1)
    assert parameter.tolist() == [-(2.0**-6)] * 4


def test_half_precision_gradients_cannot_be_unscaled_here(remote: Any) -> None:
    """As torch says of all its optimizers."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer, one = remote("SGD", [parameter], amp_scaling=False), scaler()
    one.scale(torch.zeros(1))
    parameter.grad = torch.ones(4, dtype=torch.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        one.step(optimizer)


def test_a_disabled_scaler_steps(client: stepwire.Client) -> None:
    pair, one = twins("SGD", client), scaler(enabled=False)
    with pair.remote:
        for params, optimizer in ((pair.params, pair.local), (pair.remote_params, pair.remote)):
            backward(params, 1, one)
            one.step(optimizer)
            one.update()
        pair.assert_close(rtol=0, atol=BOUND)


def test_one_scaler_for_two_optimizers(remote: Any) -> None:
    """One of them overflows: that one waits, the other steps, and the scale falls once."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [remote("SGD", [parameter], lr=1.0) for parameter in params]
    one = scaler()
    one.scale(torch.zeros(1))
    params[0].grad, params[1].grad = torch.full((3,), 2.0**10), torch.full((3,), float("nan"))
    for optimizer in optimizers:
        one.step(optimizer)
    one.update()
    assert [parameter.tolist() for parameter in params] == [[0.0] * 3, [1.0] * 3]
    assert ([optimizer.applied_step for optimizer in optimizers], one.get_scale()) == ([1, 0], 2.0**9)
