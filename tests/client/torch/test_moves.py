"""An optimizer whose session moves: to another server, to several, and back."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
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
