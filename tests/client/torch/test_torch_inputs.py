"""Every case of PyTorch's own optimizer tests: equal to torch within rounding, or refused with a reason."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from tests.client.torch.torch_inputs import RULES, Input, error_inputs, inputs, supports_complex
from tests.client.torch.twins import SHAPES, Twins, gradients, parameters

pytest.importorskip("expecttest", reason="torch's own tests need it (pip install expecttest)")

pytestmark = pytest.mark.slow

STEPS = 8
EPS = torch.finfo(torch.float32).eps

# How far the drop-in may be from torch, in units of float32's eps, of the parameter or of one, whichever is larger.
# Both round, in another order of operations, and errors add up over the steps. At most half of this was measured.
# Torch's own for-loop, foreach and fused forms are as far from each other, and as far from the formula in float64.
ULPS = {
    "Adam": 4,
    "AdamW": 4,
    "SGD": 4,
    "RAdam": 4,
    "Adamax": 4,
    "Adagrad": 4,
    "Adadelta": 4,
    "RMSprop": 8,  # divides by a root that is small at first: an update of lr/√(1 − alpha), ten times lr
    "NAdam": 24,  # torch keeps the product of its momenta in float32, the server computes it in float64
}
REFUSED = ("differentiable", "capturable")


def served(rule: str) -> list[Input]:
    """Return the configurations that are not refused."""
    return [one for one in inputs(rule) if not any(one.arguments.get(name) for name in REFUSED)]


def plain(rule: str) -> list[Input]:
    """Return those of them that differ in more than how torch computes."""
    return [one for one in served(rule) if not one.arguments.get("foreach") and not one.arguments.get("fused")]


def optimizers(one: Input, client: stepwire.Client, params: Any, remote_params: Any) -> tuple[Any, Any]:
    """Make torch's optimizer of a case, and ours."""
    return (
        getattr(torch.optim, one.rule)(params, **copy.deepcopy(one.arguments)),
        getattr(stepwire.torch, one.rule)(remote_params, server=client, **copy.deepcopy(one.arguments)),
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_case_equals_torch(rule: str, client: stepwire.Client) -> None:
    for one in served(rule):
        pair = Twins(functools.partial(optimizers, one, client))
        with pair.remote:
            pair.step(STEPS)
        bound = ULPS[rule] * EPS
        pair.assert_close(rtol=bound, atol=bound, what=one.description)


@pytest.mark.parametrize("rule", RULES)
def test_complex_parameters_equal_torch(rule: str, client: stepwire.Client) -> None:
    assert supports_complex(rule)
    bound = ULPS[rule] * EPS
    for one in plain(rule):
        pair = Twins(
            functools.partial(optimizers, one, client), lambda: parameters(((9, 5), (3,), ()), torch.complex64)
        )
        with pair.remote:
            pair.step(STEPS)
        pair.assert_close(rtol=bound, atol=bound, what=one.description)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_parameters_of_half_precision_have_masters_that_equal_torch(
    rule: str, dtype: torch.dtype, client: stepwire.Client
) -> None:
    """Torch rounds moments and parameters to 8 or 11 bits at every step; a session keeps float32."""
    bound = ULPS[rule] * EPS
    for one in plain(rule)[dtype is torch.float16 :: 2]:  # each in one of the two dtypes
        halves = parameters(dtype=dtype)
        masters = [torch.nn.Parameter(half.detach().float()) for half in halves]
        local, remote = optimizers(one, client, masters, halves)
        with remote:
            for step in range(1, STEPS + 1):
                for master, half, gradient in zip(masters, halves, gradients(SHAPES, step, dtype), strict=True):
                    master.grad, half.grad = gradient.float(), gradient
                local.step()
                remote.step()
            masters_now = remote.state_dict()["stepwire"]["masters"]
        for index, (half, master) in enumerate(zip(halves, masters, strict=True)):
            torch.testing.assert_close(masters_now[index], master.detach(), rtol=bound, atol=bound)
            assert torch.equal(half.detach(), masters_now[index].to(dtype)), one.description


@pytest.mark.parametrize("rule", RULES)
def test_what_torch_refuses_is_refused_in_torchs_words(rule: str, target: str) -> None:
    for listed in error_inputs(rule):
        given = listed.optimizer_error_input
        params = parameters() if given.params is None else given.params
        with pytest.raises(listed.error_type, match=listed.error_regex):
            getattr(stepwire.torch, rule)(params, server=target, **given.kwargs)
