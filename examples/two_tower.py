"""A recommender of two towers on generated clicks: two workers, whose embeddings are on a server alone.

    pip install '.[demo]' torch==2.13.0
    python examples/two_tower.py [--target HOST:PORT] [--quick]

A user and an item are a row each of two tables, which a linear tower follows. Few items are popular, so that most rows
of a table are in no batch. The local run has the tables in the model and steps them by torch's SparseAdam. The workers
hold no table at all: `RemoteEmbedding` pulls the rows of a batch and sends their gradients. Each worker has half of
every batch, and steps towers and tables in rounds with the other. Here workers are threads; in earnest each is a
process on a machine of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import stepwire
import stepwire.torch
from command_line import a_server, command_line, progress_bar
from comparison import Comparison

SEED, LR, BATCH, WORKERS = 7, 2e-2, 256, 2
USERS, ITEMS, DIM = 300, 3_000, 16


class Clicks(NamedTuple):
    """Pairs of a user and an item, and the clicks on them, as tensors."""

    users: torch.Tensor
    items: torch.Tensor
    clicked: torch.Tensor

    def part(self, worker: int) -> Clicks:
        """Return the pairs of one worker."""
        return Clicks(*(values[worker::WORKERS] for values in self))


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


def train(model: TwoTowers, batches: Sequence[Clicks], optimizers: list[Any], steps: Iterable[int]) -> dict[int, float]:
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


def train_locally(
    batches: Sequence[Clicks], held_out: Clicks, tables: Sequence[Any], steps: Iterable[int]
) -> tuple[dict[int, float], float]:
    """Train a model with tables of its own, and return its losses and its AUC."""
    model = TwoTowers(*tables)
    sparse = torch.optim.SparseAdam([table.weight for table in tables], lr=LR)
    losses = train(model, batches, [torch.optim.Adam(model.towers(), lr=LR), sparse], steps)
    return losses, model.auc(held_out)


class Worker:
    """One of the workers: towers in its model, and tables on the server."""

    def __init__(self, target: str, job: str, rank: int) -> None:
        way = stepwire.Aggregation(workers=WORKERS)
        self.rank = rank
        self.tables = [
            stepwire.torch.RemoteEmbedding(
                count,
                DIM,
                optimizer=stepwire.Adam(lr=LR),
                seed=SEED + place,
                server=target,
                aggregation=way,
                worker=rank,
                request_id=f"{job}-{place}",
            )
            for place, count in enumerate((USERS, ITEMS))
        ]
        self.model = TwoTowers(*self.tables)
        self.optimizer = stepwire.torch.Adam(
            self.model.towers(), lr=LR, server=target, worker=rank, aggregation=way, job=job
        )

    def train(self, batches: Sequence[Clicks], steps: Iterable[int]) -> dict[int, float]:
        """Train on this worker's part of each batch, and return its losses."""
        own = [batch.part(self.rank) for batch in batches]
        return train(self.model, own, [self.optimizer, *self.tables], steps)

    def close(self) -> None:
        """Leave."""
        for each in (self.optimizer, *self.tables):
            each.close()


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=800, quick_steps=60, plot="two-tower.png")
    world, steps, job = World(), range(1, options.steps + 1), uuid.uuid4().hex
    batches, held_out = [world.clicks(BATCH) for _ in steps], world.clicks(20_000)
    with a_server(options.target) as target, progress_bar(options) as bar, contextlib.ExitStack() as stack:
        workers = [Worker(target, job, rank) for rank in range(WORKERS)]
        for worker in workers:
            stack.callback(worker.close)
        pulled = [torch.from_numpy(table.session.pull()["weight"]) for table in workers[0].tables]
        own = [torch.nn.Embedding.from_pretrained(values, freeze=False, sparse=True) for values in pulled]
        local_losses, local_auc = train_locally(
            batches, held_out, own, bar.track(steps, description="local SparseAdam")
        )
        shown = bar.track(steps, description=f"stepwire, {WORKERS} workers")
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as threads:
            parts = list(threads.map(lambda worker: worker.train(batches, steps if worker.rank else shown), workers))
        losses = {number: sum(part[number] for part in parts) / WORKERS for number in steps}
        auc = workers[-1].model.auc(held_out)
    rows = len(torch.unique(batches[-1].users)) + len(torch.unique(batches[-1].items))
    return Comparison(
        title="Two towers on generated clicks: SparseAdam, local and on a server",
        curves={"local torch": local_losses, "stepwire": losses},
        facts={
            "rows of the tables": USERS + ITEMS,
            "rows in the last batch": rows,
            "workers": WORKERS,
            "AUC, local": local_auc,
            "AUC, stepwire": auc,
        },
        checks={
            "the AUCs differ by less than 0.01": abs(local_auc - auc) < 0.01,
            "the model has learnt: AUC above 0.6": auc > 0.6,
        },
    ).show(options)


if __name__ == "__main__":
    sys.exit(main())
