"""A recommender of two towers on generated clicks: its embeddings on a server alone, beside torch's own.

    pip install '.[demo]' torch==2.13.0
    python examples/two_tower.py [--target HOST:PORT] [--quick]

A user and an item are a row each of two tables, which a linear tower follows. Few items are popular, so that most rows
of a table are in no batch. The local run has the tables in the model and steps them by torch's SparseAdam. The other
run holds no table at all: `RemoteEmbedding` pulls the rows of a batch and sends their gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

import stepwire
import stepwire.torch
from command_line import a_server, command_line, progress_bar
from comparison import Comparison

SEED, LR, BATCH = 7, 2e-2, 256
USERS, ITEMS, DIM = 300, 3_000, 16


class Clicks(NamedTuple):
    """Pairs of a user and an item, and the clicks on them, as tensors."""

    users: torch.Tensor
    items: torch.Tensor
    clicked: torch.Tensor


class World:
    """Users with tastes and items with traits, by which clicks are drawn; items are popular by Zipf's law."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(SEED)
        self._tastes, self._traits = (self._rng.standard_normal((count, 4)) for count in (USERS, ITEMS))
        popularity = 1.0 / np.arange(1, ITEMS + 1)
        self._popularity = popularity / popularity.sum()

    def clicks(self, count: int) -> Clicks:
        """Draw some pairs."""
        users = self._rng.integers(0, USERS, count)
        items = self._rng.choice(ITEMS, count, p=self._popularity)
        likings = (self._tastes[users] * self._traits[items]).sum(axis=1)
        clicked = self._rng.random(count) < 1.0 / (1.0 + np.exp(-2.0 * likings))
        return Clicks(torch.from_numpy(users), torch.from_numpy(items), torch.from_numpy(clicked).float())


class TwoTowers(torch.nn.Module):
    """The score of a user and an item: the product of two towers over two embeddings."""

    def __init__(self, users: torch.nn.Module, items: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.users, self.items = users, items
        self.user_tower, self.item_tower = torch.nn.Linear(DIM, DIM), torch.nn.Linear(DIM, DIM)

    def forward(self, clicks: Clicks) -> torch.Tensor:
        """Return a logit for each pair."""
        return (self.user_tower(self.users(clicks.users)) * self.item_tower(self.items(clicks.items))).sum(dim=1)

    def towers(self) -> list[torch.nn.Parameter]:
        """Return the dense parameters."""
        return [*self.user_tower.parameters(), *self.item_tower.parameters()]

    @torch.no_grad()
    def auc(self, clicks: Clicks) -> float:
        """Return the chance that a pair with a click has a higher score than one without."""
        ranks = np.argsort(np.argsort(self(clicks).numpy())) + 1
        positive = clicks.clicked.numpy() > 0.5
        count = int(positive.sum())
        return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def train(model: TwoTowers, batches: list[Clicks], optimizers: list[Any], steps: Iterable[int]) -> dict[int, float]:
    """Train a model and return the loss at each step."""
    losses = {}
    for number in steps:
        for each in optimizers:
            each.zero_grad()
        clicks = batches[number - 1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(clicks), clicks.clicked)
        loss.backward()  # type: ignore[no-untyped-call]
        for each in optimizers:
            each.step()
        losses[number] = loss.item()
    return losses


def local_tables(remote: Callable[[], list[stepwire.torch.RemoteEmbedding]]) -> list[torch.nn.Embedding]:
    """Return tables in the model with the first values of those on the server."""
    pulled = [torch.from_numpy(each.session.pull()["weight"]) for each in remote()]
    return [torch.nn.Embedding.from_pretrained(values, freeze=False, sparse=True) for values in pulled]


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=800, quick_steps=60, plot="two-tower.png")
    world, steps = World(), range(1, options.steps + 1)
    batches, held_out = [world.clicks(BATCH) for _ in steps], world.clicks(20_000)
    rule = stepwire.Adam(lr=LR)
    with a_server(options.target) as target, stepwire.connect(target) as client, progress_bar(options) as bar:
        tables = [
            stepwire.torch.RemoteEmbedding(count, DIM, optimizer=rule, seed=SEED + k, server=client)
            for k, count in enumerate((USERS, ITEMS))
        ]
        own = local_tables(lambda: tables)
        local, remote = TwoTowers(*own), TwoTowers(*tables)
        sparse = torch.optim.SparseAdam([table.weight for table in own], lr=LR)
        dense = torch.optim.Adam(local.towers(), lr=LR)
        local_losses = train(local, batches, [dense, sparse], bar.track(steps, description="local SparseAdam"))
        with stepwire.torch.Adam(remote.towers(), lr=LR, server=client) as towers:
            losses = train(remote, batches, [towers, *tables], bar.track(steps, description="stepwire"))
        aucs = local.auc(held_out), remote.auc(held_out)
        for table in tables:
            table.close()
    rows = len(torch.unique(batches[-1].users)) + len(torch.unique(batches[-1].items))
    return Comparison(
        title="Two towers on generated clicks: SparseAdam, local and on a server",
        curves={"local torch": local_losses, "stepwire": losses},
        facts={
            "rows of the tables": USERS + ITEMS,
            "rows in the last batch": rows,
            "AUC, local": aucs[0],
            "AUC, stepwire": aucs[1],
        },
        checks={
            "the AUCs differ by less than 0.01": abs(aucs[0] - aucs[1]) < 0.01,
            "the model has learnt: AUC above 0.6": aucs[1] > 0.6,
        },
    ).show(options)


if __name__ == "__main__":
    sys.exit(main())
