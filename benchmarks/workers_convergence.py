"""Do several workers train as well as one? Held-out losses and accuracies of every way to meet, over several seeds.

    python benchmarks/workers_convergence.py [--quick] [--only digits] [--json FILE] [--plot FILE]

Four workers train one model in PyTorch: an MLP on scikit-learn's digits, or a character-level language model on text
that ships with Python. Each has a quarter of every batch, with the same schedule of the learning rate. One worker with
whole batches is the measure. An asynchronous gradient is of a quarter of the batch, so its learning rate is twice that
of a round (the square root of 4, as Adam needs it) before the staleness divides it. Every worker is a thread with an
optimizer and a connection of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import pydoc_data.topics
import statistics
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import stepwire
import stepwire.torch
from stepwire.torch import LocalSGD
from stepwire_server.testing import serving

WORKERS = 4
POINTS = 20
WAYS = {
    "one worker": "one worker with whole batches",
    "sync": "a round of all four is one step",
    "async": "every gradient is a step, its learning rate divided by 1 + staleness",
    "DiLoCo": "local AdamW, an outer Nesterov step every 20",
    "DiLoCo, int8": "the same, pseudo-gradients in int8 with error feedback",
}
EVERY = 20


class Task(NamedTuple):
    """A model with its data.

    Attributes:
        network: a function of a seed that makes the model.
        batch: a function of a seed and a number that makes a batch.
        held_out: the data of the final loss.
        lr: the learning rate of AdamW.
        steps: the steps with whole batches.
    """

    network: Callable[[int], nn.Module]
    batch: Callable[[int, int], tuple[Any, Any]]
    held_out: tuple[Any, Any]
    lr: float
    steps: int


@dataclasses.dataclass
class Outcome:
    """One training.

    Attributes:
        curve: the held-out loss by step of one worker.
        accuracy: the fraction of held-out targets that have the best score at the end.
    """

    curve: dict[int, float]
    accuracy: float

    @property
    def loss(self) -> float:
        """The held-out loss at the end."""
        return list(self.curve.values())[-1]


def digits(steps: int) -> Task:
    """An MLP of 64, 128 and 10 units on the digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy((images / 16.0).astype(np.float32)), torch.from_numpy(labels)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1400], order[1400:]

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def batch(seed: int, number: int) -> tuple[Any, Any]:
        drawn = np.random.default_rng((seed, number)).choice(train, 64)
        return x[drawn], y[drawn]

    return Task(network, batch, (x[test], y[test]), 1.5e-3, steps)


def characters(steps: int, context: int = 12, width: int = 24, units: int = 128) -> Task:
    """The next character from the twelve before: embeddings, one hidden layer, a softmax."""
    text = "\n".join(pydoc_data.topics.topics.values())[:200_000]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    windows = codes.unfold(0, context + 1, 1)
    train, held_out = windows[:180_000], windows[181_000:185_000]

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Embedding(len(alphabet), width),
            nn.Flatten(),
            nn.Linear(context * width, units),
            nn.Tanh(),
            nn.Linear(units, len(alphabet)),
        )

    def batch(seed: int, number: int) -> tuple[Any, Any]:
        drawn = train[torch.from_numpy(np.random.default_rng((seed, number)).integers(0, len(train), 128))]
        return drawn[:, :-1], drawn[:, -1]

    return Task(network, batch, (held_out[:, :-1], held_out[:, -1]), 2e-3, steps)


@torch.no_grad()
def held_out(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return the loss and the accuracy on held-out data."""
    inputs, targets = task.held_out
    scores = model(inputs)
    right = (scores.argmax(dim=1) == targets).double().mean()
    return nn.functional.cross_entropy(scores, targets).item(), right.item()


def worker(task: Task, way: str, seed: int, model: nn.Module, own: dict[str, Any]) -> Outcome:
    """Train a model as one of the workers; `own` says which one."""
    rank = own["worker"]
    count = 1 if way == "one worker" else WORKERS
    with contextlib.ExitStack() as exits:
        stepper, optimizer = _stepper(way, model, task, own, exits)
        factor = functools.partial(_factor, steps=task.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        curve: dict[int, float] = {}
        for number in range(1, task.steps + 1):
            x, y = (values[rank::count] for values in task.batch(seed, number))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            stepper.step()
            scheduler.step()
            if rank == 0 and number % max(1, task.steps // POINTS) == 0:
                curve[number] = held_out(model, task)[0]
        loss, accuracy = _at_the_end(way, optimizer, model, task)
        curve[task.steps] = loss
    return Outcome(curve, accuracy)


def _stepper(
    way: str, model: nn.Module, task: Task, own: dict[str, Any], exits: contextlib.ExitStack
) -> tuple[Any, Any]:
    """Return the object that steps, and the optimizer whose learning rate a scheduler sets."""
    if way.startswith("DiLoCo"):
        inner = torch.optim.AdamW(model.parameters(), lr=task.lr)
        dtype = "int8" if way.endswith("int8") else "float32"
        local = LocalSGD(model, inner, every=EVERY, workers=WORKERS, gradient_dtype=dtype, **own)
        return exits.enter_context(local), inner
    if way == "one worker":
        own = {"server": own["server"]}
    elif way == "sync":
        own["workers"] = WORKERS
    else:
        own["aggregation"] = stepwire.Aggregation(workers=WORKERS, mode="async", staleness_correction=True)
    lr = task.lr * math.sqrt(WORKERS) if way == "async" else task.lr
    optimizer = stepwire.torch.AdamW(model.parameters(), lr=lr, **own)
    return exits.enter_context(optimizer), optimizer


def _at_the_end(way: str, optimizer: Any, model: nn.Module, task: Task) -> tuple[float, float]:
    if way == "async":
        parameters = optimizer.session.pull()
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), parameters.values(), strict=True):
                parameter.copy_(torch.from_numpy(values))
    return held_out(model, task)


def _factor(number: int, steps: int) -> float:
    """Warm up over a twentieth of the steps, and come down to a twentieth by a cosine."""
    warmup = steps // 20
    if number < warmup:
        return (number + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * (number - warmup) / (steps - warmup)))


def train(task: Task, way: str, seed: int, target: str) -> Outcome:
    """Train in one way, and return the outcome of the worker that was the last to end."""
    job, count = uuid.uuid4().hex, 1 if way == "one worker" else WORKERS
    models = [task.network(seed) for _ in range(count)]  # here, since torch's seed is the whole process's
    with ThreadPoolExecutor(count) as threads:
        running = [
            threads.submit(worker, task, way, seed, model, {"server": target, "worker": rank, "job": job})
            for rank, model in enumerate(models)
        ]
        ended = [each.result() for each in running]
    return ended[0]


def compare(task: Task, seeds: int, target: str) -> tuple[dict[str, Any], dict[str, list[Outcome]]]:
    """Return the figures of every way, and its trainings."""
    found = {way: [train(task, way, seed, target) for seed in range(seeds)] for way in WAYS}
    figures: dict[str, Any] = {"workers": WORKERS, "seeds": seeds, "steps": task.steps}
    for way, outcomes in found.items():
        for name in ("loss", "accuracy"):
            values = [getattr(outcome, name) for outcome in outcomes]
            figures[f"{way}: {name}"] = statistics.mean(values)
            figures[f"{way}: {name}, deviation over seeds"] = statistics.stdev(values)
            if way != "one worker":
                base = [getattr(outcome, name) for outcome in found["one worker"]]
                differences = [value - other for value, other in zip(values, base, strict=True)]
                figures[f"{way}: {name}, difference"] = statistics.mean(differences)
    return figures, found


def draw(found: Mapping[str, Mapping[str, list[Outcome]]], path: pathlib.Path) -> None:
    """Draw the mean held-out losses, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.6), layout="constrained", squeeze=False)
    for axis, (name, ways) in zip(axes[0], found.items(), strict=True):
        for index, (way, outcomes) in enumerate(ways.items()):
            steps = list(outcomes[0].curve)
            means = [statistics.mean(outcome.curve[step] for outcome in outcomes) for step in steps]
            axis.plot(steps, means, color=f"C{index}", label=way, linewidth=4 / 1.4**index)
        axis.set(title=name, xlabel="steps of each worker", ylabel="held-out loss", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Run the tasks and print, and write JSON and the plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--only", choices=("digits", "characters"), help="this task alone")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--plot", type=pathlib.Path, help="also draw the curves here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (2, (40, 40)) if arguments.quick else (5, (600, 1000))
    tasks = {"digits": digits(steps[0]), "characters": characters(steps[1])}
    results, found = {}, {}
    with serving() as target:
        for name, task in tasks.items():
            if arguments.only in (None, name):
                results[name], found[name] = compare(task, seeds, target)
                print(name)
                for figure, value in results[name].items():
                    print(f"  {figure:<42} {value:.5f}" if isinstance(value, float) else f"  {figure:<42} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
