"""A recommender of two towers on generated clicks: two workers, whose embeddings are on a server alone.

    pip install '.[demo]' torch==2.13.0
    python examples/two_tower.py [--target HOST:PORT] [--quick]

A user and an item are a row each of two tables, which a linear tower follows. Items have 63-bit ids, and their table
takes ten times the memory that a worker may allocate: the system enforces that limit. `RemoteEmbedding` pulls the rows
of a batch and sends their gradients. Each worker is a process, has half of every batch, and steps towers and tables in
rounds with the other.

The local run is dense. Its tables have a row of each user and item that is clicked, and torch's Adagrad passes over all
of them. A gradient of zeros moves nothing by Adagrad, so both runs are one training.
"""

from __future__ import annotations

import contextlib
import pathlib
import resource
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import stepwire
import stepwire.torch
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from training_process import TrainingProcess

SEED, LR, BATCH, WORKERS = 7, 0.1, 256, 2
USERS, ITEMS, DIM = 300, 3_000, 16
LIMIT_BYTES = 32 << 20
"""The memory that a worker may allocate beside its programs."""
CAPACITY = 10 * LIMIT_BYTES // (4 * DIM)
"""The rows of the table of items."""


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
        self._ids = self._rng.integers(0, 2**63, ITEMS)
        popularity = 1.0 / np.arange(1, ITEMS + 1)
        self._popularity = popularity / popularity.sum()

    def clicks(self, count: int) -> Clicks:
        """Draw some pairs."""
        users = self._rng.integers(0, USERS, count)
        items = self._rng.choice(ITEMS, count, p=self._popularity)
        likings = (self._tastes[users] * self._traits[items]).sum(axis=1)
        clicked = self._rng.random(count) < 1.0 / (1.0 + np.exp(-2.0 * likings))
        return Clicks(torch.from_numpy(users), torch.from_numpy(self._ids[items]), torch.from_numpy(clicked).float())


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


class LocalTable(torch.nn.Module):
    """A table of the rows of some ids in this process, with dense gradients."""

    def __init__(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._ids, self._rows = ids, torch.nn.Embedding.from_pretrained(values, freeze=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of some ids."""
        found: torch.Tensor = self._rows(torch.searchsorted(self._ids, ids))
        return found


def remote_table(place: int, target: str, job: str, rank: int) -> stepwire.torch.RemoteEmbedding:
    """Make the table of users or that of items, or join it."""
    return stepwire.torch.RemoteEmbedding(
        (USERS, CAPACITY)[place],
        DIM,
        optimizer=stepwire.Adagrad(lr=LR),
        seed=SEED + place,
        hashed=place == 1,
        server=target,
        aggregation=stepwire.Aggregation(workers=WORKERS),
        worker=rank,
        request_id=f"{job}-{place}",
    )


def work(target: str, job: str, rank: int, steps: int, *, report: Callable[[float], None]) -> tuple[float, bool]:
    """Be one of the workers: report the losses, and return the AUC, and whether the worker could hold the table."""
    torch.set_num_threads(1)
    batches, held_out = drawn(steps)
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(contextlib.closing(remote_table(place, target, job, rank))) for place in (0, 1)]
        model = TwoTowers(*tables)
        optimizer = stack.enter_context(
            stepwire.torch.Adagrad(
                model.towers(), lr=LR, server=target, worker=rank, workers=WORKERS, job=job, timeout=600.0
            )
        )
        own, optimizers = [batch.part(rank) for batch in batches], [optimizer, *tables]
        for number in range(1, steps + 1):
            if number == 2:  # by now the libraries have their own memory, and all threads run
                limit_memory(LIMIT_BYTES)
            report(train(model, own, optimizers, [number])[number])
        return model.auc(held_out), can_hold_the_table()


def drawn(steps: int) -> tuple[list[Clicks], Clicks]:
    """Draw the batches of a training, the same in every process, and pairs that are held out of it."""
    world = World()
    return [world.clicks(BATCH) for _ in range(steps)], world.clicks(20_000)


def limit_memory(nbytes: int) -> None:
    """Have the system refuse this process more than so many bytes beside those that it has."""
    status = pathlib.Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * kib + nbytes, resource.RLIM_INFINITY))


def can_hold_the_table() -> bool:
    """Tell whether this process may allocate the table of items, or a third of it."""
    try:
        np.empty((CAPACITY // 3, DIM), np.float32)
    except MemoryError:
        return False
    return True


def train_locally(
    batches: Sequence[Clicks], held_out: Clicks, tables: Sequence[LocalTable], steps: Iterable[int]
) -> tuple[dict[int, float], float]:
    """Train a model with tables of its own, and return its losses and its AUC."""
    model = TwoTowers(*tables)
    losses = train(model, batches, [torch.optim.Adagrad(model.parameters(), lr=LR)], steps)
    return losses, model.auc(held_out)


def first_values(target: str, job: str, batches: Sequence[Clicks], held_out: Clicks) -> list[LocalTable]:
    """Return the rows that a training needs, as the servers make them."""
    named = [torch.unique(torch.cat([each[place] for each in (*batches, held_out)])) for place in (0, 1)]
    with contextlib.ExitStack() as stack:
        found = []
        for place, ids in enumerate(named):
            table = stack.enter_context(contextlib.closing(remote_table(place, target, f"{job}-first", 0)))
            rows: Any = table.session.pull(rows={"weight": ids.numpy()})["weight"]
            found.append(LocalTable(ids, torch.from_numpy(rows.values)))
    return found


def rounds(workers: Sequence[TrainingProcess]) -> Iterator[float]:
    """Yield the mean loss of each round."""
    for losses in zip(*(worker.reports() for worker in workers), strict=True):
        yield sum(losses) / WORKERS


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=800, quick_steps=60, plot="two-tower.png")
    steps, job = range(1, options.steps + 1), uuid.uuid4().hex
    batches, held_out = drawn(options.steps)
    with a_server(options.target) as target, progress_bar(options) as bar:
        own = first_values(target, job, batches, held_out)
        local_losses, local_auc = train_locally(batches, held_out, own, bar.track(steps, description="local Adagrad"))
        workers = [TrainingProcess(work, target, job, rank, options.steps) for rank in range(WORKERS)]
        shown = bar.track(rounds(workers), total=options.steps, description=f"stepwire, {WORKERS} workers")
        losses = dict(zip(steps, shown, strict=True))
        (auc, could_hold), *_ = (worker.returned for worker in workers)
    rows = len(torch.unique(batches[-1].users)) + len(torch.unique(batches[-1].items))
    return Comparison(
        title="Two towers on generated clicks: Adagrad, dense and by rows on a server",
        curves={"local torch": local_losses, "stepwire": losses},
        facts={
            "MiB that a worker may allocate": LIMIT_BYTES >> 20,
            "MiB of the table of items": CAPACITY * DIM * 4 >> 20,
            "rows in the last batch": rows,
            "workers": WORKERS,
            "AUC, local": local_auc,
            "AUC, stepwire": auc,
        },
        checks={
            "no worker can hold the table": not could_hold,
            "the AUCs differ by less than 0.01": abs(local_auc - auc) < 0.01,
            "the model has learnt: AUC above 0.6": auc > 0.6,
        },
    ).show(options)


if __name__ == "__main__":
    sys.exit(main())
