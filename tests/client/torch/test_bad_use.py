"""Bad use: the error names the parameter or the field and the remedy, and nothing was applied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError, NonFiniteGradientError, UnavailableError, UnsupportedFeatureError
from stepwire_server.testing import serving
from tests.client.torch.twins import Twins, assert_same_bits, parameters


def named() -> list[tuple[str, Parameter]]:
    return list(zip("abc", parameters(), strict=True))


# --- the server -----------------------------------------------------------------------------------------


def test_an_unreachable_server(remote: Any, closed_port: int) -> None:
    with pytest.raises(
        UnavailableError, match=rf"server='127.0.0.1:{closed_port}': .*is it running \(stepwire serve\)"
    ):
        remote("Adam", parameters(), server=f"127.0.0.1:{closed_port}", timeout=0.2)


def test_a_server_that_went_away(exits: contextlib.ExitStack) -> None:
    params = parameters()
    with contextlib.ExitStack() as running:
        target = running.enter_context(serving(threads=1))
        client = exits.enter_context(stepwire.connect(target, timeout=120.0))
        optimizer = stepwire.torch.SGD(params, server=client, timeout=0.2)  # of its steps; the client's is of all else
    before = [parameter.detach().clone() for parameter in params]
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UnavailableError, match=f"server='{target}': .*; try again once the server is there"):
        optimizer.step()
    assert_same_bits(params, before)
    optimizer.detach()


# --- options --------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a transport": ({"transport": "carrier"}, "transport: 'carrier' is no transport; use one of: auto, tcp"),
    "non_finite": ({"non_finite": "panic"}, "non_finite: 'panic'; use one of: reject, skip, allow"),
    "a gradient dtype": (
        {"gradient_dtype": "float64"},
        "gradient_dtype: .* use one of float32, bfloat16, float16, int8",
    ),
    "a reply dtype": ({"reply_dtype": "int8"}, "reply_dtype: .* use one of float32, bfloat16, float16"),
    "a precision": ({"state_precision": "int4"}, "state_precision: 'int4'; use one of: float32, bfloat16, int8"),
    "a bound": ({"clip_grad_norm": -1.0}, "clip_grad_norm is -1.0; it must be finite and > 0"),
    "a value": ({"clip_grad_value": 0.0}, "clip_grad_value is 0.0; it must be finite and > 0"),
    "feedback": ({"error_feedback": True}, "error_feedback: .* create the session with gradient_dtype 'int8', or"),
    "channels": ({"channels": 0}, "channels: 0 is not a positive integer"),
    "a timeout": ({"timeout": -1.0}, "timeout: -1.0 is not a positive number of seconds"),
    "a lease": ({"lease_seconds": -1.0}, "lease_seconds: -1.0 is not a positive number"),
    "no servers": ({"server": []}, "target: .* is neither a target nor a list of targets"),
    "a server that is none": ({"server": 5}, "target: 5 is neither a target nor a list of targets"),
    "an infinite rate": ({"lr": float("inf")}, "lr is inf; it must be finite and >= 0"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_out_of_range(what: str, remote: Any) -> None:
    options, words = OPTIONS[what]
    with pytest.raises(InvalidRequestError, match=words):
        remote("Adam", parameters(), **options)


def test_a_device_that_the_server_has_not(remote: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match="asks for 'cuda:7', and this server has cpu; name one of these"):
        remote("Adam", parameters(), device="cuda:7")


def test_an_unknown_option_is_pythons_error(remote: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sever'"):
        remote("Adam", parameters(), sever="host:1")


@pytest.mark.parametrize("rule", ["Adam", "SGD", "Adadelta"])
def test_a_negative_rate_is_torchs_error(rule: str, remote: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0"):
        remote(rule, parameters(), lr=-1.0)


@pytest.mark.parametrize("rule", ["LAMB", "LARS", "Lion"])
def test_a_negative_rate_of_rules_that_torch_has_not(rule: str, remote: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"optimizer.lr: lr is -1.0; it must be finite and >= 0"):
        remote(rule, parameters(), lr=-1.0)


NUMBERS: list[tuple[str, Any, str]] = [
    ("lr", -1.0, r"hyperparameters\[1\].lr: lr is -1.0; it must be finite and >= 0"),
    ("lr", float("nan"), r"hyperparameters\[1\].lr: lr is nan"),
    ("lr", torch.tensor(-0.5), r"hyperparameters\[1\].lr: lr is -0.5"),
    ("betas", (1.0, 0.9), r"hyperparameters\[1\].beta1: beta1 is 1.0; it must be in \[0, 1\)"),
    ("betas", (0.9,), r"hyperparameters\[1\].betas: betas is \(0.9,\); it must be two numbers"),
    ("eps", -1.0, r"hyperparameters\[1\].eps: eps is -1.0"),
    ("weight_decay", -1.0, r"hyperparameters\[1\].weight_decay: weight_decay is -1.0"),
    ("maximize", 2, r"hyperparameters\[1\].maximize: maximize is 2.0; it must be True or False"),
]


@pytest.mark.parametrize(("name", "value", "words"), NUMBERS)
def test_a_number_that_goes_out_of_range_later(name: str, value: Any, words: str, remote: Any) -> None:
    params = parameters()
    optimizer = remote("Adam", [{"params": params[:1]}, {"params": params[1:]}])
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    before, good = [parameter.detach().clone() for parameter in params], optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(InvalidRequestError, match=words):
        optimizer.step()
    assert_same_bits(params, before)
    optimizer.param_groups[1][name] = good
    optimizer.step()
    assert optimizer.applied_step == 1


# --- the end --------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({**optimizer.handle(), "stepwire": {}}),
    "a handle": lambda optimizer: optimizer.load_state_dict(optimizer.handle()),
    "upload_parameters": lambda optimizer: optimizer.upload_parameters(),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]}),
}


@pytest.mark.parametrize("end", ["close", "detach"])
@pytest.mark.parametrize("use", USES)
def test_use_after_the_end(use: str, end: str, remote: Any) -> None:
    params = parameters()
    optimizer = remote("Adam", params)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in params]
    getattr(optimizer, end)()
    with pytest.raises(InvalidRequestError, match="the optimizer is closed; make a new one, with session=…"):
        USES[use](optimizer)
    assert_same_bits(params, before)
    assert (optimizer.applied_step, len(optimizer.param_groups)) == (1, 1)
    optimizer.zero_grad()


# --- NaN ------------------------------------------------------------------------------------------------


def spoil(params: list[Any]) -> None:
    params[1].grad[2] = float("nan")
    params[2].grad.fill_(float("inf"))


def test_reject_names_the_tensor_and_training_goes_on(remote: Any) -> None:
    pair = Twins(
        lambda params, theirs: (torch.optim.Adam(params), remote("Adam", list(zip("abc", theirs, strict=True))))
    )
    pair.step(2)
    pair.draw()
    spoil(pair.remote_params)
    before, state = [parameter.detach().clone() for parameter in pair.remote_params], pair.remote.state_dict()
    with pytest.raises(
        NonFiniteGradientError, match=r"tensor 'b' holds NaN or Inf .* Mend the gradient, or .* 'skip'"
    ) as raised:
        pair.remote.step()
    assert (raised.value.metadata["tensor"], raised.value.metadata["non_finite_count"]) == ("b", "2")
    assert_same_bits(pair.remote_params, before)
    for index, entry in pair.remote.state_dict()["state"].items():
        assert_same_bits(entry.values(), state["state"][index].values())
    pair.step(2)
    pair.assert_close(rtol=1e-6, atol=1e-6)
    assert pair.remote.applied_step == 4


def test_skip_uses_up_a_number_and_moves_nothing(remote: Any) -> None:
    pair = Twins(lambda params, theirs: (torch.optim.Adam(params), remote("Adam", theirs, non_finite="skip")))
    pair.step(2)
    pair.draw()
    spoil(pair.remote_params)
    before = [parameter.detach().clone() for parameter in pair.remote_params]
    pair.remote.step()
    assert pair.remote.last_result.skipped
    assert_same_bits(pair.remote_params, before)
    pair.step(2)
    pair.assert_close(rtol=1e-6, atol=1e-6)
    assert pair.remote.applied_step == 5
    assert pair.remote.state_dict()["state"][0]["step"].item() == 4.0


def test_allow_applies_it_as_torch_does(remote: Any) -> None:
    pair = Twins(lambda params, theirs: (torch.optim.Adam(params), remote("Adam", theirs, non_finite="allow")))
    pair.step(2)
    pair.draw()
    spoil(pair.params)
    spoil(pair.remote_params)
    pair.local.step()
    pair.remote.step()
    pair.step(2)
    for one, other in zip(pair.params, pair.remote_params, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert [parameter.isnan().sum().item() for parameter in pair.remote_params] == [0, 1, 1]
