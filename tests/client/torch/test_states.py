"""State dicts go from torch's optimizers to the drop-in and back bit for bit, and runs go on as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from tests.client.torch.twins import assert_same_bits, gradients, parameters, same_bits

EPS = torch.finfo(torch.float32).eps

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"betas": (0.8, 0.9)}),
    ("AdamW", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"momentum": 0.0}),
    ("NAdam", {"momentum_decay": 0.01}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("RMSprop", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adadelta", {}),
]


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{key}={value[key]}" for key in value) or "default"


def local(rule: str, params: list[Any], options: dict[str, Any]) -> Any:
    return getattr(torch.optim, rule)(params, lr=0.01, **options)


def remote_of(rule: str, params: list[Any], options: dict[str, Any], client: stepwire.Client, **ours: Any) -> Any:
    return getattr(stepwire.torch, rule)(params, lr=0.01, **options, server=client, **ours)


def advance(optimizer: Any, params: list[Any], steps: range) -> None:
    """Apply some steps; the last parameter has a gradient only in even ones."""
    for step in steps:
        for place, (parameter, gradient) in enumerate(
            zip(params, gradients([p.shape for p in params], step, params[0].dtype), strict=True)
        ):
            parameter.grad = None if place == len(params) - 1 and step % 2 else gradient
        optimizer.step()


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare everything that torch has, in every bit."""
    assert one["param_groups"] == other["param_groups"]
    assert list(one["state"]) == list(other["state"])
    for index, entry in one["state"].items():
        kept = {key: value for key, value in entry.items() if value is not None}
        theirs = {key: value for key, value in other["state"][index].items() if value is not None}
        assert list(kept) == list(theirs)
        for key, value in kept.items():
            assert same_bits(value, theirs[key]), (index, key, value, theirs[key])


@pytest.mark.parametrize(("rule", "options"), CASES, ids=case_id)
def test_torchs_state_goes_in_and_comes_out_bit_for_bit(
    rule: str, options: dict[str, Any], client: stepwire.Client
) -> None:
    params = parameters()
    theirs = local(rule, params, options)
    advance(theirs, params, range(1, 6))
    with remote_of(rule, params, options, client) as ours:
        ours.load_state_dict(theirs.state_dict())
        out = ours.state_dict()
    assert_same_state(theirs.state_dict(), out)
    again = local(rule, params, options)
    again.load_state_dict(out)
    assert_same_state(theirs.state_dict(), again.state_dict())


@pytest.mark.parametrize(("rule", "options"), CASES, ids=case_id)
def test_our_state_goes_through_torch_bit_for_bit(rule: str, options: dict[str, Any], client: stepwire.Client) -> None:
    params = parameters()
    with remote_of(rule, params, options, client) as ours:
        advance(ours, params, range(1, 6))
        out = ours.state_dict()
    theirs = local(rule, params, options)
    theirs.load_state_dict(out)
    assert_same_state(theirs.state_dict(), out)
    with remote_of(rule, params, options, client) as again:
        again.load_state_dict(theirs.state_dict())
        assert_same_state(again.state_dict(), out)


@pytest.mark.parametrize(("rule", "options"), CASES, ids=case_id)
def test_a_run_that_moves_to_the_server_and_back_equals_torch(
    rule: str, options: dict[str, Any], client: stepwire.Client
) -> None:
    """Local, remote, local: steps, moments and averages go on where they were."""
    straight, params = parameters(), parameters()
    advance(local(rule, straight, options), straight, range(1, 13))
    first = local(rule, params, options)
    advance(first, params, range(1, 5))
    with remote_of(rule, params, options, client) as second:
        second.load_state_dict(first.state_dict())
        advance(second, params, range(5, 9))
        third = local(rule, params, options)
        third.load_state_dict(second.state_dict())
    advance(third, params, range(9, 13))
    bound = 24 * EPS if rule == "NAdam" else 8 * EPS
    for one, other in zip(straight, params, strict=True):
        torch.testing.assert_close(other, one, rtol=bound, atol=bound)


@pytest.mark.parametrize(("rule", "options"), CASES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_loaded_run_has_the_bits_of_one_that_was_never_interrupted(
    rule: str, options: dict[str, Any], dtype: torch.dtype, client: stepwire.Client
) -> None:
    straight, params = parameters(dtype=dtype), parameters(dtype=dtype)
    with remote_of(rule, straight, options, client) as ours:
        advance(ours, straight, range(1, 9))
        expected = ours.state_dict()
    with remote_of(rule, params, options, client) as ours:
        advance(ours, params, range(1, 5))
        saved = ours.state_dict()
    with remote_of(rule, params, options, client) as ours:
        ours.load_state_dict(saved)
        advance(ours, params, range(5, 9))
        assert_same_state(ours.state_dict(), expected)
        masters = ours.state_dict()["stepwire"]["masters"]
    assert_same_bits(params, straight)
    assert_same_bits(masters.values(), expected["stepwire"]["masters"].values())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_moments_of_fewer_bits_go_on_in_every_bit(precision: str, client: stepwire.Client) -> None:
    straight, params = parameters(), parameters()
    with remote_of("AdamW", straight, {}, client, state_precision=precision) as ours:
        advance(ours, straight, range(1, 9))
    with remote_of("AdamW", params, {}, client, state_precision=precision) as ours:
        advance(ours, params, range(1, 5))
        saved = ours.state_dict()
    with remote_of("AdamW", params, {}, client, state_precision=precision) as ours:
        ours.load_state_dict(saved)
        advance(ours, params, range(5, 9))
    assert_same_bits(params, straight)


def test_loading_in_place_goes_back_in_time(client: stepwire.Client) -> None:
    """With the model's own state dict, as ever; the session's step numbers go on."""
    params = parameters()
    with remote_of("Adam", params, {}, client) as ours:
        advance(ours, params, range(1, 4))
        saved, model = ours.state_dict(), [parameter.detach().clone() for parameter in params]
        advance(ours, params, range(4, 7))
        there = [parameter.detach().clone() for parameter in params]
        with torch.no_grad():
            for parameter, values in zip(params, model, strict=True):
                parameter.copy_(values)
        ours.load_state_dict(saved)
        advance(ours, params, range(4, 7))
        assert ours.applied_step == 9
        assert_same_state(ours.state_dict(), {**saved, "state": ours.state_dict()["state"]})
    assert_same_bits(params, there)


@pytest.mark.parametrize(("source", "into"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_decay_goes_with_the_state_dict_as_in_torch(source: str, into: str, client: stepwire.Client) -> None:
    """Torch's AdamW is Adam with a key in its groups: Adam reads the key from a state dict, AdamW always has it."""
    params, others, first = parameters(), parameters(), parameters()
    saved = local(source, first, {"weight_decay": 0.1})
    advance(saved, first, range(1, 4))
    theirs = local(into, others, {})
    theirs.load_state_dict(saved.state_dict())
    with remote_of(into, params, {}, client) as ours:
        ours.load_state_dict(saved.state_dict())
        assert ours.param_groups[0]["decoupled_weight_decay"] == theirs.param_groups[0]["decoupled_weight_decay"]
        advance(ours, params, range(4, 8))
    advance(theirs, others, range(4, 8))
    for one, other in zip(others, params, strict=True):
        torch.testing.assert_close(other, one, rtol=8 * EPS, atol=8 * EPS)


def test_a_state_dict_of_an_older_torch(client: stepwire.Client) -> None:
    """Steps were plain numbers, and groups had fewer keys."""
    params, others, first = parameters(), parameters(), parameters()
    saved = local("Adam", first, {})
    advance(saved, first, range(1, 4))
    old = saved.state_dict()
    old["param_groups"] = [
        {key: old["param_groups"][0][key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
    ]
    old["state"] = {index: {**entry, "step": int(entry["step"])} for index, entry in old["state"].items()}
    theirs = local("Adam", others, {})
    theirs.load_state_dict(old)
    with remote_of("Adam", params, {}, client) as ours:
        ours.load_state_dict(old)
        advance(ours, params, range(4, 8))
        advance(theirs, others, range(4, 8))
        assert_same_state_but_rounding(ours.state_dict(), theirs.state_dict())


def test_a_state_dict_of_an_optimizer_that_a_cuda_graph_captured(client: stepwire.Client) -> None:
    """The moments are the usual ones; the flag, which is refused otherwise, is dropped."""
    params, first = parameters(), parameters()
    saved = local("Adam", first, {})
    advance(saved, first, range(1, 4))
    captured = saved.state_dict()
    captured["param_groups"][0].update(capturable=True)
    with remote_of("Adam", params, {}, client) as ours:
        ours.load_state_dict(captured)
        assert ours.param_groups[0]["capturable"] is False
        advance(ours, params, range(4, 6))
        ours.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
        assert ours.state_dict()["state"][0]["step"].item() == 5.0


def assert_same_state_but_rounding(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=8 * EPS, atol=8 * EPS)
