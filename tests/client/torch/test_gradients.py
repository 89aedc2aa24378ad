"""Gradients that are missing, zero, sparse, or lie otherwise than their parameters; and parameters that are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError
from tests.client.torch.twins import Twins, assert_same_bits, gradients, parameters, same_bits

EPS = torch.finfo(torch.float32).eps


def adam(client: stepwire.Client, **options: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a function that makes both optimizers."""
    return lambda params, remote_params: (
        torch.optim.Adam(params, lr=0.01, **options),
        stepwire.torch.Adam(remote_params, lr=0.01, server=client, **options),
    )


def test_gradients_that_lie_otherwise_than_their_parameters(client: stepwire.Client) -> None:
    pair = Twins(adam(client), lambda: parameters(((6, 4), (5,), (5,))))
    with pair.remote:
        for step in range(1, 4):
            for params in (pair.params, pair.remote_params):
                params[0].grad = gradients(((4, 6),), step)[0].t()
                params[1].grad = torch.tensor(float(step)).expand(5)
                params[2].grad = torch.full((5,), 1j * step).conj().imag
            pair.local.step()
            pair.remote.step()
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


def test_a_sparse_gradient_is_refused_and_nothing_is_applied(remote: Any) -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = remote("Adam", embedding.named_parameters(), lr=0.1)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidRequestError, match=r"the gradient of 'weight' is sparse .*Embedding\(sparse=False\)"):
        optimizer.step()
    assert same_bits(embedding.weight, before)
    assert optimizer.applied_step == 0


def test_without_a_gradient_state_and_step_stay(client: stepwire.Client) -> None:
    pair = Twins(adam(client, weight_decay=0.1))
    with pair.remote:
        for step in range(6):
            pair.draw()
            for params in (pair.params, pair.remote_params):
                params[step % 3].grad = None
            pair.local.step()
            pair.remote.step()
            state = pair.remote.state_dict()["state"]
            assert {i: e["step"].item() for i, e in state.items()} == {
                i: pair.local.state[p]["step"].item() for i, p in enumerate(pair.params) if pair.local.state.get(p)
            }
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


def test_frozen_parameters_stay_until_they_are_not(client: stepwire.Client) -> None:
    pair = Twins(adam(client))
    with pair.remote:
        for params in (pair.params, pair.remote_params):
            params[1].requires_grad_(False)
        frozen = pair.remote_params[1].detach().clone()
        for step in range(1, 7):
            if step == 4:
                assert same_bits(pair.remote_params[1], frozen)
                for params in (pair.params, pair.remote_params):
                    params[1].requires_grad_(True)
            pair.draw()
            if step < 4:
                pair.params[1].grad = pair.remote_params[1].grad = None
            pair.local.step()
            pair.remote.step()
        assert pair.remote.state_dict()["state"][1]["step"].item() == 3.0
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)


def test_a_step_without_any_gradient_is_none(remote: Any) -> None:
    params = parameters()
    optimizer = remote("Adam", params)
    before = [parameter.detach().clone() for parameter in params]
    optimizer.step()
    assert optimizer.applied_step == 0
    assert optimizer.state_dict()["state"] == {}
    assert_same_bits(params, before)


def test_zeros_are_a_gradient(client: stepwire.Client) -> None:
    """`zero_grad(set_to_none=False)`: moments decay and t goes on, as in torch."""
    pair = Twins(adam(client))
    with pair.remote:
        pair.step(2)
        for optimizer in (pair.local, pair.remote):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        assert all(parameter.grad.eq(0).all() for parameter in pair.remote_params)
        assert pair.remote.applied_step == 3
        pair.assert_close(rtol=4 * EPS, atol=4 * EPS)
        pair.remote.zero_grad()
        assert all(parameter.grad is None for parameter in pair.remote_params)
