"""State dicts that cannot be loaded are refused with the reason, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError
from tests.client.torch.twins import Twins, assert_same_bits, parameters

EPS = torch.finfo(torch.float32).eps


def twins(rule: str, client: stepwire.Client) -> Twins:
    return Twins(
        lambda params, remote_params: (
            getattr(torch.optim, rule)(params, lr=0.01),
            getattr(stepwire.torch, rule)(remote_params, lr=0.01, server=client),
        )
    )


def without(state: dict[str, Any], slot: str) -> dict[str, Any]:
    del state["state"][0][slot]
    return state


def reshaped(state: dict[str, Any]) -> dict[str, Any]:
    state["state"][1]["exp_avg"] = torch.zeros(3)
    return state


def structured(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["amsgrad"] = True
    return state


def altered(slot: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def alter(state: dict[str, Any]) -> dict[str, Any]:
        state["state"][0][slot] = value
        return state

    return alter


def foreign(state: dict[str, Any]) -> dict[str, Any]:
    state["stepwire"]["masters"] = {7: torch.zeros(3)}
    return state


DAMAGED: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda state: without(state, "exp_avg"), r"state\[0\]\['exp_avg'\]: is missing; the state has"),
    (lambda state: without(state, "step"), r"state\[0\]\['step'\]: is missing"),
    (reshaped, r"state\[1\]\['exp_avg'\]: shape \(3,\) is not the parameter's \(129,\); .* another model's"),
    (structured, r"state\[0\]\['max_exp_avg_sq'\]: is missing"),
    (altered("step", torch.tensor(2.5)), r"state\[0\]\['step'\]: 2.5 is no number of steps"),
    (
        altered("momentum_buffer", torch.zeros(33, 17)),
        r"state\[0\]\['momentum_buffer'\]: Adam has no such slot; is the state another optimizer's\?",
    ),
    (altered("step", torch.tensor(float("nan"))), r"state\[0\]\['step'\]: nan is no number of steps"),
    (altered("step", torch.tensor(float("inf"))), r"state\[0\]\['step'\]: inf is no number of steps"),
    (altered("step", "three"), r"state\[0\]\['step'\]: 'three' is no number of steps"),
    (altered("exp_avg", [1.0, 2.0]), r"state\[0\]\['exp_avg'\]: \[1.0, 2.0\] is no tensor; the state is damaged"),
    (foreign, r"masters: position 7 is none of the 3 parameters; the state is another model's"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGED, ids=[words[-20:] for _, words in DAMAGED])
def test_a_state_dict_that_cannot_be_loaded_changes_nothing(
    damage: Callable[[dict[str, Any]], dict[str, Any]], words: str, client: stepwire.Client
) -> None:
    pair = twins("Adam", client)
    with pair.remote:
        pair.step(3)
        before, sessions = pair.remote.state_dict(), len(list(client.sessions()))
        groups = copy.deepcopy(before["param_groups"])
        with pytest.raises(InvalidRequestError, match=words):
            pair.remote.load_state_dict(damage(copy.deepcopy(before)))
        assert len(list(client.sessions())) == sessions
        after = pair.remote.state_dict()
        assert after["param_groups"] == groups
        for index, entry in before["state"].items():
            assert_same_bits(entry.values(), after["state"][index].values())
        pair.step(2)
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("product", [-0.5, 1.5, float("nan"), "some", None])
def test_nadam_refuses_a_product_that_no_numbers_make(product: Any, client: stepwire.Client) -> None:
    pair = twins("NAdam", client)
    with pair.remote:
        pair.step(3)
        saved = pair.local.state_dict()
        saved["state"][1]["mu_product"] = product
        with pytest.raises(
            InvalidRequestError, match=r"state\[1\]\['mu_product'\]: (.* is no product of momenta|is missing)"
        ):
            pair.remote.load_state_dict(saved)


def test_8_bit_moments_need_their_scales(client: stepwire.Client) -> None:
    params = parameters()
    with stepwire.torch.Adam(params, server=client, state_precision="int8") as optimizer:
        with pytest.raises(
            InvalidRequestError, match="exp_avg_scale: is missing, and this session's state_precision needs it"
        ):
            optimizer.load_state_dict(torch.optim.Adam(params).state_dict())


def test_a_state_dict_of_another_optimizer(client: stepwire.Client) -> None:
    """Torch accepts such a dict, and fails at the next step."""
    pair = twins("Adam", client)
    theirs = parameters()
    other = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    with pair.remote:
        with pytest.raises(InvalidRequestError, match="a group has no 'betas', which Adam needs; is it of another"):
            pair.remote.load_state_dict(other.state_dict())
        for parameter in theirs:
            parameter.grad = torch.ones_like(parameter)
        other.step()
        with pytest.raises(
            InvalidRequestError, match="a group has no 'betas'|'momentum_buffer'.* Adam has no such slot"
        ):
            pair.remote.load_state_dict(other.state_dict())
        pair.step(2)
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


def test_a_handle_of_another_optimizers_session(client: stepwire.Client) -> None:
    pair = twins("Adam", client)
    with pair.remote, stepwire.torch.SGD(parameters(), server=client) as other:
        with pytest.raises(InvalidRequestError, match="a group has no 'betas'"):
            pair.remote.load_state_dict(other.handle())
        pair.step(2)
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)
        assert client.session(other.session_id).applied_step == 0


def test_a_change_is_not_forgotten_by_a_load_that_fails_in_another_structure(client: stepwire.Client) -> None:
    """The load makes a session of the new structure, with the model's values, and gives it up."""
    pair = twins("Adam", client)
    with pair.remote:
        pair.step(2)
        for params in (pair.params, pair.remote_params):
            with torch.no_grad():
                params[0].mul_(-3.0)
        with pytest.raises(InvalidRequestError, match="max_exp_avg_sq"):
            pair.remote.load_state_dict(structured(copy.deepcopy(pair.local.state_dict())))
        pair.step(2)
        pair.assert_close(rtol=8 * EPS, atol=8 * EPS)
