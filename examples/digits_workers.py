"""Handwritten digits by several processes, one of which is killed: each has a part of every batch, and no collectives.

    pip install '.[demo]' torch
    python examples/digits_workers.py [--target HOST:PORT] [--quick]

The processes know the server, the job's name and their index. The same training in one process has whole batches.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
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
WORKERS = 4
KILLED = 1


def train(optimizer: Any, model: nn.Module, part: slice, steps: int, report: Callable[[int, float], None]) -> None:
    """Train a model on a part of each batch, up to a step, from the step that the optimizer is at."""
    digits = Digits.load()
    for number in range(optimizer.applied_step + 1, steps + 1):
        x, y = (torch.from_numpy(values[part]) for values in digits.batch(np.random.default_rng((SEED, number))))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        report(number, loss.item())
        optimizer.step()


def network() -> nn.Module:
    """Make the network: the same at every call."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def worker(pipe: Connection, rank: int, target: str, job: str, steps: int) -> None:
    """Be one of the workers: report the loss of each step, and the parameters at the end."""
    torch.set_num_threads(1)
    model = network()
    with stepwire.torch.Adam(
        model.parameters(), lr=LR, server=target, worker=rank, workers=WORKERS, job=job
    ) as optimizer:
        train(optimizer, model, slice(rank, None, WORKERS), steps, lambda *told: pipe.send(told))
    pipe.send((None, [parameter.detach().numpy() for parameter in model.parameters()]))


@dataclasses.dataclass
class Training:
    """A training by several processes.

    Attributes:
        target: the server.
        steps: the steps.
        kill_at: the step at which one of the processes is killed, and started again; 0 for none.
        losses: the loss of each step, by step and by worker.
        ends: the parameters of each worker at the end.
        kills: the number of kills.
    """

    target: str
    steps: int
    kill_at: int = 0
    job: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    losses: dict[int, dict[int, float]] = dataclasses.field(default_factory=dict)
    ends: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    kills: int = 0

    def run(self, on_step: Callable[[int], None]) -> Training:
        """Train to the end."""
        running = dict(self._started(rank) for rank in range(WORKERS))
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                rank, process = running[pipe]
                try:
                    number, value = pipe.recv()
                except (EOFError, OSError):  # OSError: the process was killed during a write
                    del running[pipe]
                    process.join()
                    if process.exitcode == -signal.SIGKILL:
                        running.update([self._started(rank)])
                    continue
                if number is None:
                    self.ends[rank] = value
                    continue
                self.losses.setdefault(number, {})[rank] = value
                on_step(len(self.losses))
                if (rank, number) == (KILLED, self.kill_at) and not self.kills:
                    self.kills += 1
                    process.kill()
        return self

    def curve(self) -> dict[int, float]:
        """Return the loss of each step over the whole batch: the mean of its parts."""
        return {
            number: float(np.mean([parts[rank] for rank in sorted(parts)])) for number, parts in self.losses.items()
        }

    def _started(self, rank: int) -> tuple[Connection, tuple[int, Any]]:
        """Start a process that has nothing of this one, as on another machine: of a server that has torch already."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "stepwire.torch"])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(theirs, rank, self.target, self.job, self.steps))
        process.start()
        theirs.close()
        return ours, (rank, process)


def main() -> int:
    """Train in one process and in several, with a kill and without, and compare."""
    options = command_line(__doc__, steps=600, quick_steps=60, plot="digits-workers.png", least_steps=2)
    torch.set_num_threads(1)
    digits, alone, model = Digits.load(), {}, network()
    with progress_bar(options) as bar, a_server(options.target) as target:

        def counted(name: str) -> Callable[..., None]:
            task = bar.add_task(name, total=options.steps)
            return lambda number, *_: bar.update(task, completed=number)

        several = Training(target, options.steps).run(counted(f"{WORKERS} workers"))
        broken = Training(target, options.steps, options.steps // 2).run(counted("one killed"))
        with stepwire.torch.Adam(model.parameters(), lr=LR, server=target) as optimizer:
            show = counted("one process")
            train(optimizer, model, slice(None), options.steps, lambda *told: (alone.update([told]), show(*told)))

    one = [parameter.detach().numpy() for parameter in model.parameters()]
    curves = {"one process": alone, f"{WORKERS} workers": several.curve(), "one killed": broken.curve()}
    apart = abs(curves["one killed"][options.steps] - alone[options.steps])
    changed = sum(differing(several.ends[0], end) for end in [*several.ends.values(), *broken.ends.values()])
    right = {"one process": accuracy(one, digits), "one killed": accuracy(broken.ends[0], digits)}
    return Comparison(
        title=f"Digits by {WORKERS} processes, one of which is killed",
        curves=curves,
        facts={
            "killed after step": options.steps // 2,
            **{f"test accuracy, {name}": value for name, value in right.items()},
            "difference of the last losses": apart,
            "largest difference of a parameter": max(
                float(abs(a - b).max()) for a, b in zip(one, broken.ends[0], strict=True)
            ),
            "tensors that differ between workers, and with the kill": changed,
        },
        checks={
            "the last losses differ by less than 1e-4": apart < 1e-4,
            "one process was killed in the middle": (several.kills, broken.kills) == (0, 1),
            "all workers end with the same parameters, to the bit, killed or not": changed == 0,
        },
        marks={options.steps // 2: "one is killed"},
    ).show(options)


def differing(one: list[Any], other: list[Any]) -> int:
    """Count the tensors that differ in a bit."""
    return sum(a.tobytes() != b.tobytes() for a, b in zip(one, other, strict=True))


def accuracy(parameters: list[Any], digits: Digits) -> float:
    """Return the fraction of test images classified right."""
    model = network()
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), parameters, strict=True):
            parameter.copy_(torch.from_numpy(values))
        found = model(torch.from_numpy(digits.test_x)).argmax(dim=1)
    return (found == torch.from_numpy(digits.test_y)).double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
