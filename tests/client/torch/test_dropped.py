"""Optimizers that nobody closes: nothing keeps them, and their sessions end."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError
from tests.support.ends import all_made

WAYS: dict[str, dict[str, Any]] = {
    "tcp": {"transport": "tcp"},
    "shared memory": {"transport": "shm"},
    "views": {"shared_views": True},
    "sent in the backward pass": {"transport": "tcp", "send_in_backward": True},
}


def backward(model: Any) -> None:
    model(torch.ones(2, 3)).pow(2).sum().backward()


def trained(optimizer: Any, model: Any, steps: int = 3) -> Any:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return optimizer


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture
def no_collector(target: str, model: Any) -> Iterator[None]:
    """No collector of garbage, so that only what nobody refers to is freed."""
    trained(stepwire.torch.Adam(model.parameters(), server=target), model)  # torch compiles parts of itself once
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def sessions(target: str) -> int:
    with stepwire.connect(target) as client:
        return client.info().sessions


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", ["steps", "state", "state_dict", "scheduler", "groups", "begun"])
def test_an_optimizer_that_is_dropped_ends_at_once_though_its_model_lives(
    target: str, model: Any, way: str, use: str
) -> None:
    all_made()
    before = sessions(target)
    optimizer = trained(stepwire.torch.Adam(model.parameters(), server=target, **WAYS[way]), model)
    if use == "state":
        assert optimizer.state[model.weight]["exp_avg"].shape == (2, 3)
    elif use == "state_dict":
        optimizer.state_dict()
    elif use == "scheduler":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        trained(optimizer, model, 1)
        scheduler.step()
        del scheduler
    elif use == "groups":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        trained(optimizer, model)
    elif use == "begun":
        backward(model)
    weak, gone = weakref.ref(optimizer), threading.Event()
    weakref.finalize(optimizer.session, gone.set)
    del optimizer
    assert weak() is None
    all_made()
    if use == "begun":  # the step has the session until it is given up, and then the circle of its failure has it
        while not gone.wait(0.01):
            gc.collect()
        all_made()
    assert gone.is_set()
    assert sessions(target) == before
    values = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model)
    assert all(torch.equal(one, other) for one, other in zip(values, model.parameters(), strict=True))


def test_a_sweep_leaves_no_sessions_threads_or_descriptors(target: str, model: Any) -> None:
    def trial() -> None:
        trained(stepwire.torch.Adam(model.parameters(), server=target), model)

    def counts() -> tuple[int, int]:
        gc.collect()
        all_made()
        return sessions(target), len(os.listdir("/proc/self/fd"))

    trial()
    before = counts()
    for _ in range(10):
        trial()
    after = counts()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 4, "gRPC closes the sockets of a channel in a thread of its own"


@pytest.mark.parametrize("keep", ["keep", "handle", "session_id", "light_state_dict", "detach"])
def test_an_optimizer_that_was_told_to_keep_its_session_leaves_it(target: str, model: Any, keep: str) -> None:
    optimizer = stepwire.torch.Adam(
        model.parameters(), server=target, keep=keep == "keep", light_state_dict=keep == "light_state_dict"
    )
    trained(optimizer, model)
    session = optimizer.session
    session_id = session.own_id
    if keep in ("handle", "detach"):
        getattr(optimizer, keep)()
    elif keep == "session_id":
        assert optimizer.session_id == session_id
    elif keep == "light_state_dict":
        assert optimizer.state_dict()["stepwire"]["handle"]
    del optimizer, session
    gc.collect()
    all_made()
    with stepwire.torch.Adam(model.parameters(), server=target, session=session_id) as again:
        assert again.applied_step == 3


def test_a_state_whose_optimizer_is_gone_says_so(target: str, model: Any) -> None:
    state = trained(stepwire.torch.Adam(model.parameters(), server=target), model).state
    gc.collect()
    with pytest.raises(InvalidRequestError, match="the optimizer is gone; keep a reference to it"):
        state[model.weight]["exp_avg"].sum()


def test_hooks_of_dropped_optimizers_do_not_pile_up(target: str, model: Any) -> None:
    def hooks() -> list[int]:
        return [len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()]

    for _ in range(3):
        trained(stepwire.torch.Adam(model.parameters(), server=target, shared_views=True), model)
    gc.collect()
    all_made()
    assert hooks() == [0, 0]
