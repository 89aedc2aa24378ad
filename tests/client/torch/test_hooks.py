"""Hooks that are registered for a block, also if an interrupt comes between torch's registration and ours."""

from __future__ import annotations

import pytest
import torch

from stepwire.torch.hooks import hooked
from tests.support.interrupts import Arrival


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


def test_a_hook_is_there_for_its_block_alone() -> None:
    one, called = optimizer(), list[bool]()
    with hooked(one.register_state_dict_pre_hook, lambda _: called.append(True)):
        one.state_dict()
    one.state_dict()
    assert called == [True]


def test_a_hook_that_an_interrupt_leaves_registered_does_nothing() -> None:
    register = optimizer().register_state_dict_pre_hook
    with (counting := Arrival()), hooked(register, lambda _: None):
        pass
    for point in range(counting.points):
        one, called = optimizer(), list[bool]()
        with pytest.raises(KeyboardInterrupt), Arrival(point):
            with hooked(one.register_state_dict_pre_hook, lambda _, called=called: called.append(True)):
                pass
        one.state_dict()
        assert called == [], point
