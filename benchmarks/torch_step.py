"""The drop-in for PyTorch beside PyTorch's own optimizer, over a model of many tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import contest
import floors
from contest import Action, Contender, Ratios, needed
from echo import EchoTargets

__all__ = ["RATIOS", "shapes", "torch_step"]

_WIDTH = 512
RATIOS: Ratios = {
    "shm to fused": ("shm", ("local fused",)),
    "shm views to fused": ("shm views", ("local fused",)),
    "shm views, bare to fused": ("shm views, bare", ("local fused",)),
    "shm views to default": ("shm views", ("local default",)),
    "tcp to its parts": ("tcp", ("raw gRPC push, pull", floors.ENGINE, floors.COPIES)),
    "tcp to fused": ("tcp", ("local fused",)),
}


def torch_step(target: str, echo: EchoTargets, *, size: int, rounds: int) -> dict[str, Any]:
    """Run the contest at about `size` parameters, with gradients made before, so that only `step` is timed."""
    contenders = [
        Contender("local fused", _local(fused=True)),
        Contender("local default", _local()),
        Contender("shm", _remote(target, "shm")),
        Contender("shm views", _remote(target, "shm", shared_views=True)),
        # As in torch, there is no check of the gradient before the update.
        Contender("shm views, bare", _remote(target, "shm", shared_views=True, non_finite="allow", telemetry="none")),
        Contender("tcp", _remote(target, "tcp")),
        *(each for each in floors.grpc_floors(echo) if each.name == "raw gRPC push, pull"),
        *floors.parts(),
    ]
    whole = sum(int(np.prod(shape)) for shape in shapes(size))
    result = contest.run_contest(contenders, whole, rounds=rounds, batch=contest.batch_of(whole))
    return result.figures() | result.ratios(RATIOS) | {"tensors": len(list(shapes(size)))}


def shapes(size: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a decoder-only transformer: blocks of matrices, biases and norms, and an embedding."""
    block = [(3 * _WIDTH, _WIDTH), (_WIDTH, _WIDTH), (4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH)]
    block += [(3 * _WIDTH,), (_WIDTH,), (4 * _WIDTH,), (_WIDTH,), (_WIDTH,), (_WIDTH,), (_WIDTH,), (_WIDTH,)]
    each = sum(int(np.prod(shape)) for shape in block)
    blocks = max(int(0.7 * size / each), 0)
    for _ in range(blocks):
        yield from block
    yield max((size - blocks * each) // _WIDTH, 1), _WIDTH


def _parameters(size: int) -> list[Any]:
    """Return parameters with gradients."""
    torch = needed("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes(size)]
    for parameter in made:
        (parameter * torch.randn_like(parameter)).sum().backward()
    return made


def _local(**form: Any) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        optimizer = needed("torch").optim.Adam(_parameters(size), **form)
        return lambda: optimizer.step()

    return prepare


def _remote(target: str, transport: str, **options: Any) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        needed("torch")
        from stepwire.torch import Adam

        parameters = _parameters(size)
        optimizer = stack.enter_context(Adam(parameters, server=target, transport=transport, **options))
        for parameter in parameters:  # a backward pass puts gradients into shared memory
            gradient, parameter.grad = parameter.grad, None
            (parameter * gradient).sum().backward()
        return lambda: optimizer.step()

    return prepare
