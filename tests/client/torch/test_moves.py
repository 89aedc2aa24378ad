"""An optimizer whose session moves: to another server, to several, and back."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from tests.client.torch.test_workers import WORKERS, Job, advance, gradients, model
from tests.client.torch.twins import assert_same_bits
from tests.support.numpy_server import numpy_server

WAYS: dict[str, dict[str, Any]] = {
    "packets": {},
    "tcp": {"transport": "tcp"},
    "views": {"shared_views": True},
    "in backward": {"send_in_backward": True, "transport": "tcp", "non_finite": "allow"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("several", [False, True])
def test_a_session_that_moves_trains_as_torch(way: str, several: bool) -> None:
    with contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(numpy_server()).target for _ in range(3))
        onto = others if several else others[:1]
        torch.manual_seed(7)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
        local = copy.deepcopy(model)
        optimizer = stepwire.torch.Adam(model.parameters(), lr=1e-2, server=first, **WAYS[way])
        stack.enter_context(contextlib.closing(optimizer))
        pairs = ((model, optimizer), (local, torch.optim.Adam(local.parameters(), lr=1e-2)))
        for step in range(12):
            if step == 4:
                stepwire.move_session(optimizer.session.own_id, first, onto)
            if step == 8:
                stepwire.move_session(optimizer.session.own_id, onto, first)
            inputs = torch.randn(8, 20)
            for each, its in pairs:
                its.zero_grad()
                each(inputs).square().mean().backward()
                its.step()
            for mine, theirs in zip(model.parameters(), local.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert optimizer.applied_step == 12


@pytest.mark.parametrize("onto", [1, 2])
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_job_of_several_workers_moves_with_all_of_them(onto: int, transport: str) -> None:
    """One worker comes back behind the move by the call that it made before."""
    steps = 6
    with contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(numpy_server()).target for _ in range(3))
        job = Job(first, transport=transport)
        params = [model(0) for _ in range(WORKERS)]
        optimizers = [job.made(worker, params[worker]) for worker in range(WORKERS)]

        def train(worker: int, numbers: range) -> None:
            for step in numbers:
                advance(optimizers[worker], params[worker], gradients(worker, step))

        job.run(lambda worker: train(worker, range(2)))
        former = optimizers[0].session.session_id
        found = stepwire.move_session(former, first, others[:onto])
        optimizers[2].detach()
        params[2] = model(9)
        optimizers[2] = job.made(2, params[2])
        assert optimizers[2].applied_step == 2
        job.run(lambda worker: train(worker, range(2, steps)))
        assert [optimizer.session.session_id for optimizer in optimizers] == [found] * WORKERS
        expected = job.alone(model(0), steps)
        for own in params:
            assert_same_bits(own, expected)
        for optimizer in optimizers:
            optimizer.close()
        left = {each.session_id for each in stack.enter_context(stepwire.connect(others[0])).sessions()}
        assert not left & set(found.split(",")), "the last worker that leaves ends the session where it is"
