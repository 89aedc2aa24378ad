"""The options besides torch's own arguments: clipping, encodings, several servers, and the transport."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import stepwire
import stepwire.torch
from stepwire.torch import RemoteOptions
from stepwire.torch.options import split_options
from stepwire_server.testing import serving
from tests.client.torch.twins import Twins, assert_same_bits, gradients, parameters

EPS = torch.finfo(torch.float32).eps


def test_options_are_parted_from_torchs_arguments() -> None:
    options, own = split_options({"lr": 0.5, "server": "host:1", "foreach": True, "label": "mine"})
    assert (options, own) == (RemoteOptions(server="host:1", label="mine"), {"lr": 0.5, "foreach": True})


def test_every_option_is_described_and_none_is_torchs() -> None:
    names = {field.name for field in dataclasses.fields(RemoteOptions)}
    described = inspect.getdoc(RemoteOptions) or ""
    assert [name for name in names if f"    {name}: " not in described] == []
    theirs = {
        name for rule in ("Adam", "SGD", "RMSprop") for name in inspect.signature(getattr(torch.optim, rule)).parameters
    }
    assert names & theirs == set()


def test_a_logger_is_told_of_each_step_and_the_session_remembers_them(remote: Any) -> None:
    told: list[tuple[int, float]] = []
    optimizer = remote("SGD", parameters(), lr=0.25, logger=lambda step, scalars: told.append((step, scalars["lr"])))
    for _ in range(2):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert told == [(1, 0.25), (2, 0.25)]
    assert [past.step for past in optimizer.session.history()] == [1, 2]


# --- clipping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 5.0, 1000.0])
@pytest.mark.parametrize("rule", ["Adam", "SGD"])
def test_clipping_by_norm_is_that_of_torch_before_a_local_step(rule: str, bound: float, remote: Any) -> None:
    pair = Twins(
        lambda params, theirs: (
            getattr(torch.optim, rule)(params, lr=0.1),
            remote(rule, theirs, lr=0.1, clip_grad_norm=bound),
        )
    )
    for _ in range(4):
        pair.draw()
        norm = clip_grad_norm_(pair.params, bound)
        pair.local.step()
        pair.remote.step()
        assert pair.remote.last_result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        pair.assert_close(rtol=8 * EPS, atol=8 * EPS)


def test_clipping_by_norm_over_several_groups_and_missing_gradients(remote: Any) -> None:
    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.01}]

    pair = Twins(
        lambda params, theirs: (torch.optim.SGD(groups(params)), remote("SGD", groups(theirs), clip_grad_norm=0.5))
    )
    for _ in range(3):
        pair.draw()
        pair.params[1].grad = pair.remote_params[1].grad = None
        clip_grad_norm_(pair.params, 0.5)
        pair.local.step()
        pair.remote.step()
    pair.assert_close(rtol=8 * EPS, atol=8 * EPS)


def test_clipping_by_value_is_that_of_torch(remote: Any) -> None:
    pair = Twins(
        lambda params, theirs: (torch.optim.SGD(params, lr=0.1), remote("SGD", theirs, lr=0.1, clip_grad_value=0.3))
    )
    for _ in range(3):
        pair.draw()
        clip_grad_value_(pair.params, 0.3)
        pair.local.step()
        pair.remote.step()
    pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


def test_clipping_leaves_the_gradients_as_they_are(remote: Any) -> None:
    """Torch would scale the gradients in place."""
    params = parameters()
    optimizer = remote("SGD", params, clip_grad_norm=0.1)
    before = gradients([parameter.shape for parameter in params], 1)
    for parameter, gradient in zip(params, before, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    assert_same_bits([parameter.grad for parameter in params], before)


# --- encodings ------------------------------------------------------------------------------------------


def run(target: Any, steps: int, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Train, and return the parameters and the state dict."""
    params = parameters(((300, 110), (190, 31), (181,)))
    with stepwire.torch.AdamW(params, lr=0.01, **{"server": target} | options) as optimizer:
        for step in range(1, steps + 1):
            for parameter, gradient in zip(params, gradients([p.shape for p in params], step), strict=True):
                parameter.grad = gradient
            optimizer.step()
        return params, optimizer.state_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_travel_in_the_dtype_that_is_asked_for(dtype: str, remote: Any) -> None:
    params, other = parameters(), parameters()
    sent, exact = remote("SGD", params, lr=0.1, gradient_dtype=dtype), remote("SGD", other, lr=0.1)
    for step in range(1, 4):
        for one, two in zip(params, other, strict=True):
            one.grad = gradients([one.shape], step)[0]
            two.grad = one.grad.to(getattr(torch, dtype)).float()
        sent.step()
        exact.step()
    assert_same_bits(params, other)


def test_replies_in_fewer_bits_are_the_masters_rounded(target: str) -> None:
    rounded, state = run(target, 4, reply_dtype="bfloat16")
    exact, other = run(target, 4)
    assert_same_bits([parameter.detach() for parameter in exact], state["stepwire"]["masters"].values())
    assert_same_bits(rounded, [parameter.detach().bfloat16().float() for parameter in exact])
    assert other["stepwire"]["masters"] == {}


def test_8_bit_gradients_with_error_feedback(target: str) -> None:
    exact, _ = run(target, 12)
    errors = []
    for feedback in (False, True):
        params, _ = run(target, 12, gradient_dtype="int8", error_feedback=feedback)
        errors.append(max((a - b).abs().max().item() for a, b in zip(params, exact, strict=True)))
    assert 0 < max(errors) < 0.1


# --- the way there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "uds", "shm"])
def test_every_way_gives_the_same_bits(transport: str, target: str) -> None:
    expected, state = run(target, 4)
    params, other = run(target, 4, transport=transport)
    assert_same_bits(params, expected)
    for index, entry in state["state"].items():
        assert_same_bits(entry.values(), other["state"][index].values())


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.5}, {"reply_dtype": "bfloat16"}], ids=str)
def test_two_servers_give_the_bits_of_one(options: dict[str, Any], target: str, exits: contextlib.ExitStack) -> None:
    """Several hundred KiB in chunks of 64 KiB: each server has half of the model, in the middle of a tensor."""
    other = exits.enter_context(serving(max_chunk_bytes=64 << 10, threads=1))
    expected, state = run(target, 4, **options)
    params, halves = run([target, other], 4, **options)
    assert_same_bits(params, expected)
    for index, entry in state["state"].items():
        assert_same_bits(entry.values(), halves["state"][index].values())
    assert_same_bits(state["stepwire"]["masters"].values(), halves["stepwire"]["masters"].values())


def test_a_state_dict_moves_from_two_servers_to_one(target: str, exits: contextlib.ExitStack) -> None:
    other = exits.enter_context(serving(max_chunk_bytes=64 << 10, threads=1))
    expected, _ = run(target, 6)
    params, state = run([target, other], 3)
    with stepwire.torch.AdamW(params, lr=0.01, server=target) as optimizer:
        optimizer.load_state_dict(state)
        for step in range(4, 7):
            for parameter, gradient in zip(params, gradients([p.shape for p in params], step), strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert_same_bits(params, expected)


def test_a_model_over_two_servers_is_resumed_by_its_id(target: str, exits: contextlib.ExitStack) -> None:
    other = exits.enter_context(serving(max_chunk_bytes=64 << 10, threads=1))
    params = parameters(((300, 110), (181,)))
    first = stepwire.torch.SGD(params, lr=0.5, server=[target, other])
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    first.detach()
    fresh = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in params]
    with stepwire.torch.SGD(fresh, lr=0.5, server=[target, other], session=first.session_id) as second:
        assert second.applied_step == 1
        assert_same_bits(fresh, params)


def test_a_device_and_a_label(remote: Any, client: stepwire.Client) -> None:
    optimizer = remote("SGD", parameters(), device="cpu", label="torch")
    assert next(info.label for info in client.sessions() if info.session_id == optimizer.session_id) == "torch"


def test_without_telemetry_and_checks_a_step_has_the_same_bits(remote: Any) -> None:
    told, silent = parameters(), parameters()
    optimizers = [remote("AdamW", told), remote("AdamW", silent, telemetry="none", non_finite="allow")]
    for step in range(1, 4):
        for params, optimizer in zip((told, silent), optimizers, strict=True):
            for parameter, gradient in zip(params, gradients([p.shape for p in params], step), strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert_same_bits(told, silent)
    assert optimizers[0].last_result.grad_norm > 0.0
    assert optimizers[1].last_result.grad_norm == 0.0
