"""Handwritten digits in PyTorch: `stepwire.torch.Adam` beside `torch.optim.Adam`.

    pip install '.[demo]' torch
    python examples/digits_torch.py [--target HOST:PORT] [--quick]

Both runs are one function. Only the imported class and `server=` differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

import stepwire.torch
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from stepwire_server.demo import Digits

SEED = 7
LR = 3e-3


def network() -> nn.Module:
    """Make the network: the same at every call."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, steps: Iterable[int]) -> dict[int, float]:
    """Train a model and return the loss at each step."""
    rng, losses = np.random.default_rng(SEED), {}
    for number in steps:
        x, y = map(torch.from_numpy, digits.batch(rng))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses[number] = loss.item()
    return losses


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=600, quick_steps=60, plot="digits-torch.png")
    torch.set_num_threads(1)  # in both runs: the order of additions, and so the last bits, depend on it
    digits, steps = Digits.load(), range(1, options.steps + 1)
    local, remote = network(), network()

    with progress_bar(options) as bar:
        optimizer: Any = torch.optim.Adam(local.parameters(), lr=LR)
        local_losses = train(local, optimizer, digits, bar.track(steps, description="local torch"))
        with a_server(options.target) as target:
            optimizer = stepwire.torch.Adam(remote.parameters(), lr=LR, server=target, label="digits in PyTorch")
            losses = train(remote, optimizer, digits, bar.track(steps, description="stepwire"))
            transport = optimizer.transport.name
            optimizer.close()

    apart = abs(losses[options.steps] - local_losses[options.steps])
    pairs = zip(local.parameters(), remote.parameters(), strict=True)
    return Comparison(
        title="Digits MLP in PyTorch: Adam, local and on a server",
        curves={"local torch": local_losses, "stepwire": losses},
        facts={
            "transport": transport,
            "test accuracy, local": accuracy(local, digits),
            "test accuracy, stepwire": accuracy(remote, digits),
            "largest difference of a parameter": max((mine - other).abs().max().item() for mine, other in pairs),
            "difference of the last losses": apart,
        },
        checks={"the last losses differ by less than 1e-4": apart < 1e-4},
    ).show(options)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the fraction of test images classified right."""
    with torch.no_grad():
        found = model(torch.from_numpy(digits.test_x)).argmax(dim=1)
    return (found == torch.from_numpy(digits.test_y)).double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
