"""Federated averaging on handwritten digits: data stay with their owners, and models meet on a server.

    pip install '.[demo]' torch
    python examples/federated_digits.py [--target HOST:PORT] [--quick]

Each client has images of some digits alone, and trains for an epoch between two rounds. FedAvg is an outer SGD with
lr=1 on the mean weighted by the number of images; FedAdam is an outer Adam. A training on all data stands beside them.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

import stepwire
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from stepwire.torch import LocalSGD
from stepwire_server.demo import Digits

SEED = 7
BATCH = 32
INNER_LR = 0.2
DIGITS = ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9))  # the digits of each client
OUTER = {"FedAvg": stepwire.SGD(lr=1.0), "FedAdam": stepwire.Adam(lr=0.03, betas=(0.9, 0.99), eps=1e-3)}


def network() -> nn.Module:
    """Make the network: the same at every call."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def epoch(x: Any, y: Any, number: int) -> Iterator[tuple[Any, Any]]:
    """Yield the batches of one epoch, in an order of its own."""
    order = np.random.default_rng((SEED, number)).permutation(len(y))
    for start in range(0, len(order), BATCH):
        drawn = order[start : start + BATCH]
        yield torch.from_numpy(x[drawn]), torch.from_numpy(y[drawn])


def train(model: nn.Module, optimizer: Any, x: Any, y: Any, number: int) -> None:
    """Train for one epoch."""
    for inputs, targets in epoch(x, y, number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def client(
    worker: int, model: nn.Module, digits: Digits, rounds: int, session: dict[str, Any]
) -> list[tuple[float, float]]:
    """Be one client; return the loss and the accuracy on test images after each round."""
    own = np.isin(digits.train_y, DIGITS[worker])
    x, y = digits.train_x[own], digits.train_y[own]
    found = []
    inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    with LocalSGD(model, inner, every=None, worker=worker, **session) as local:
        local.weight = float(len(y))
        for number in range(1, rounds + 1):
            train(model, inner, x, y, number)
            local.synchronize()
            found.append(tested(model, digits))
    return found


def federated(outer: stepwire.Optimizer, target: str, digits: Digits, rounds: int) -> list[tuple[float, float]]:
    """Train by all clients, each in a thread in the place of a machine; return what the first one found."""
    way = stepwire.Aggregation(workers=len(DIGITS), reduction="weighted_mean")
    session = {"server": target, "outer": outer, "aggregation": way, "job": uuid.uuid4().hex}
    models = [network() for _ in DIGITS]  # not in the threads, which draw from one generator
    with ThreadPoolExecutor(len(DIGITS)) as threads:
        running = [threads.submit(client, worker, each, digits, rounds, session) for worker, each in enumerate(models)]
        found = [each.result() for each in running]
    assert all(each == found[0] for each in found)  # all have the same model after each round
    return found[0]


def central(digits: Digits, rounds: int) -> list[tuple[float, float]]:
    """Train on all data in one place, an epoch a round."""
    model, found = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    for number in range(1, rounds + 1):
        train(model, optimizer, digits.train_x, digits.train_y, number)
        found.append(tested(model, digits))
    return found


@torch.no_grad()
def tested(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Return the loss and the accuracy on test images."""
    scores, y = model(torch.from_numpy(digits.test_x)), torch.from_numpy(digits.test_y)
    right = (scores.argmax(dim=1) == y).double().mean()
    return nn.functional.cross_entropy(scores, y).item(), right.item()


def main() -> int:
    """Train in one place and by clients, and compare."""
    options = command_line(__doc__, steps=60, quick_steps=12, plot="federated-digits.png")
    torch.set_num_threads(1)
    digits, rounds = Digits.load(), options.steps
    runs: dict[str, Callable[[str], Any]] = {"all data": lambda target: central(digits, rounds)}
    for name, outer in OUTER.items():
        runs[name] = lambda target, outer=outer: federated(outer, target, digits, rounds)
    with progress_bar(options) as bar, a_server(options.target) as target:
        found = {name: runs[name](target) for name in bar.track(runs, description="trainings")}

    curves = {name: dict(enumerate((loss for loss, _ in each), 1)) for name, each in found.items()}
    right = {name: each[-1][1] for name, each in found.items()}
    enough = {"FedAvg": 0.5, "FedAdam": 0.5} if options.quick else {"FedAvg": 0.9, "FedAdam": 0.9}
    return Comparison(
        title="Federated digits: clients with some digits each",
        curves=curves,
        facts={
            "images of each client": [int(np.isin(digits.train_y, own).sum()) for own in DIGITS],
            **{f"test accuracy, {name}": value for name, value in right.items()},
        },
        checks={
            f"{name} classifies {least:.0%} of the test images right": right[name] >= least
            for name, least in enough.items()
        },
    ).show(options)


if __name__ == "__main__":
    sys.exit(main())
