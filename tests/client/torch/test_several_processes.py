"""Training by two processes: one optimizer each, and one state in all by `ZeroRedundancyOptimizer`."""

from __future__ import annotations

import copy
import datetime
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import stepwire
import stepwire.torch

if not dist.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own use of torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer

EPS = torch.finfo(torch.float32).eps
RANKS = 2
STEPS = 6
Make = Callable[[Any, str], Any]

WAYS: dict[str, Make] = {
    "torch": lambda params, target: torch.optim.Adam(params, lr=0.01),
    "each": lambda params, target: stepwire.torch.Adam(params, lr=0.01, server=target),
    "each, early": lambda params, target: stepwire.torch.Adam(
        params, lr=0.01, server=target, transport="tcp", send_in_backward=True
    ),
    "each, views": lambda params, target: stepwire.torch.Adam(params, lr=0.01, server=target, shared_views=True),
    "one": lambda params, target: ZeroRedundancyOptimizer(
        params, optimizer_class=stepwire.torch.Adam, lr=0.01, server=target
    ),
    "one, views": lambda params, target: ZeroRedundancyOptimizer(
        params, optimizer_class=stepwire.torch.Adam, lr=0.01, server=target, shared_views=True
    ),
}


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))


def train(rank: int, make: Make, target: str) -> torch.Tensor:
    """Return the parameters after some steps, with a checkpoint of all that is saved and loaded on the way."""
    network = DistributedDataParallel(model(), gradient_as_bucket_view=True)
    optimizer = make(network.parameters(), target)
    for step in range(STEPS):
        inputs = torch.randn((8, 20), generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()
        if step == STEPS // 2 and isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict(0)
            saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
            dist.broadcast_object_list(saved, 0)
            optimizer.load_state_dict(saved[0])
    inner = getattr(optimizer, "optim", optimizer)
    if isinstance(inner, stepwire.torch.RemoteOptimizer):
        inner.close()
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def run(rank: int, folder: str, target: str) -> None:
    """Train in every way, as one of the processes, and save the parameters of each."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120))
    try:
        torch.save({way: train(rank, make, target) for way, make in WAYS.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other processes' copies of torch
def test_two_processes_train_as_with_torch(target: str, tmp_path: pathlib.Path) -> None:
    torch.multiprocessing.spawn(run, args=(str(tmp_path), target), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for way in WAYS:
        assert torch.equal(first[way], second[way]), way
        torch.testing.assert_close(first[way], first["torch"], rtol=16 * EPS, atol=16 * EPS, msg=way)


@pytest.fixture
def alone(tmp_path: pathlib.Path) -> Any:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_alone_has_the_whole_state(alone: Any, target: str) -> None:
    network, straight = model(), model()
    optimizer = WAYS["one"](network.parameters(), target)
    plain = torch.optim.Adam(straight.parameters(), lr=0.01)
    for step in range(4):
        for each, trained in ((optimizer, network), (plain, straight)):
            each.zero_grad()
            trained(torch.full((3, 20), 0.1 * step)).square().sum().backward()
            each.step()
        if step == 1:
            optimizer.consolidate_state_dict()
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
            assert sorted(saved["state"]) == [0, 1, 2, 3]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.optim.session.shapes) == 5
    for one, other in zip(straight.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=16 * EPS, atol=16 * EPS)
    optimizer.optim.close()
