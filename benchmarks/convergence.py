"""Do compact moments train as well? Final losses with moments in float32, bfloat16 and 8 bits, over several seeds.

    python benchmarks/convergence.py [--quick]

A real server steps two models in NumPy. One is an MLP on scikit-learn's digits. The other is a character-level language
model on text that ships with Python (the topics of its help, PSF licence). Everything but the precision is the same for
a seed, so that the spread over seeds is the measure of differences between precisions.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

import stepwire
from stepwire_server.testing import serving

Array = npt.NDArray[Any]
Parameters = dict[str, Array]
PRECISIONS = ("float32", "bfloat16", "int8")


class Task(NamedTuple):
    """A model with its data.

    Attributes:
        initial: a function that makes the parameters.
        loss: `(parameters, inputs, targets) → (mean loss, gradients)`.
        batches: a function that yields `(inputs, targets)`.
        held_out: the data of the final loss.
        lr: Adam's learning rate.
    """

    initial: Callable[[np.random.Generator], Parameters]
    loss: Callable[[Parameters, Array, Array], tuple[float, Parameters]]
    batches: Callable[[np.random.Generator, int], Iterator[tuple[Array, Array]]]
    held_out: tuple[Array, Array]
    lr: float


def digits() -> Task:
    """An MLP of 64, 128 and 10 units on the digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1400], order[1400:]

    def initial(rng: np.random.Generator) -> Parameters:
        return {"w1": _weights(rng, 64, 128), "b1": _zeros(128), "w2": _weights(rng, 128, 10), "b2": _zeros(10)}

    def loss(p: Parameters, x: Array, y: Array) -> tuple[float, Parameters]:
        hidden = np.maximum(x @ p["w1"] + p["b1"], 0.0)
        value, slope = _cross_entropy(hidden @ p["w2"] + p["b2"], y)
        back = (slope @ p["w2"].T) * (hidden > 0.0)
        return value, {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ slope, "b2": slope.sum(0)}

    def batches(rng: np.random.Generator, steps: int) -> Iterator[tuple[Array, Array]]:
        for _ in range(steps):
            chosen = rng.choice(train, 64)
            yield images[chosen], labels[chosen]

    return Task(initial, loss, batches, (images[test], labels[test]), lr=1e-3)


def language_model(context: int = 12, width: int = 24, units: int = 256) -> Task:
    """The next character from the twelve before: embeddings, one hidden layer, a softmax."""
    text = "\n".join(pydoc_data.topics.topics.values())[:200_000]
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(character) for character in text])
    windows = np.lib.stride_tricks.sliding_window_view(codes, context + 1)
    train, held_out = windows[:180_000], windows[181_000:185_000]

    def initial(rng: np.random.Generator) -> Parameters:
        return {
            "embedding": (0.1 * rng.standard_normal((len(alphabet), width))).astype(np.float32),
            "w1": _weights(rng, context * width, units),
            "b1": _zeros(units),
            "w2": _weights(rng, units, len(alphabet)),
            "b2": _zeros(len(alphabet)),
        }

    def loss(p: Parameters, x: Array, y: Array) -> tuple[float, Parameters]:
        embedded = p["embedding"][x].reshape(len(x), -1)
        hidden = np.tanh(embedded @ p["w1"] + p["b1"])
        value, slope = _cross_entropy(hidden @ p["w2"] + p["b2"], y)
        back = (slope @ p["w2"].T) * (1.0 - hidden * hidden)
        rows = np.zeros_like(p["embedding"])
        np.add.at(rows, x, (back @ p["w1"].T).reshape(*x.shape, width))
        return value, {
            "embedding": rows,
            "w1": embedded.T @ back,
            "b1": back.sum(0),
            "w2": hidden.T @ slope,
            "b2": slope.sum(0),
        }

    def batches(rng: np.random.Generator, steps: int) -> Iterator[tuple[Array, Array]]:
        for _ in range(steps):
            chosen = train[rng.integers(0, len(train), 128)]
            yield chosen[:, :-1], chosen[:, -1]

    return Task(initial, loss, batches, (held_out[:, :-1], held_out[:, -1]), lr=2e-3)


def final_loss(client: stepwire.Client, task: Task, precision: str, seed: int, steps: int) -> float:
    """Train once and return the loss on held-out data."""
    rng = np.random.default_rng(seed)
    parameters = task.initial(rng)
    optimizer = stepwire.Adam(lr=task.lr)
    schedule = stepwire.Schedule.cosine(steps, warmup_steps=steps // 20, final_factor=0.05)
    with client.create_session(
        parameters, optimizer=optimizer, schedule=schedule, state_precision=precision
    ) as session:
        for inputs, targets in task.batches(rng, steps):
            parameters = session.step(task.loss(parameters, inputs, targets)[1])
    return task.loss(parameters, *task.held_out)[0]


def compare(client: stepwire.Client, task: Task, seeds: int, steps: int) -> dict[str, Any]:
    """Return the mean and spread of the final losses, and of the differences to float32 seed by seed."""
    losses = {
        precision: [final_loss(client, task, precision, seed, steps) for seed in range(seeds)]
        for precision in PRECISIONS
    }
    figures: dict[str, Any] = {"seeds": seeds, "steps": steps}
    for precision, values in losses.items():
        figures[f"{precision}_mean"] = statistics.mean(values)
        figures[f"{precision}_deviation"] = statistics.stdev(values)
        if precision != "float32":
            differences = [a - b for a, b in zip(values, losses["float32"], strict=True)]
            figures[f"{precision}_difference"] = statistics.mean(differences)
            figures[f"{precision}_difference_deviation"] = statistics.stdev(differences)
    return figures


def main() -> None:
    """Run both tasks and print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    arguments = parser.parse_args()
    seeds, steps = (2, (40, 40)) if arguments.quick else (5, (800, 1500))
    results = {}
    with serving() as target, stepwire.connect(target) as client:
        for (name, task), count in zip(
            (("digits", digits()), ("language_model", language_model())), steps, strict=True
        ):
            results[name] = compare(client, task, seeds, count)
            print(name)
            for figure, value in results[name].items():
                print(f"  {figure:<32} {value:.5f}" if isinstance(value, float) else f"  {figure:<32} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _cross_entropy(scores: Array, targets: Array) -> tuple[float, Array]:
    """Return the mean loss and its gradient by the scores."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    chances = odds / odds.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    value = -float(np.mean(np.log(chances[rows, targets] + 1e-30)))
    chances[rows, targets] -= 1.0
    return value, chances / len(targets)


def _weights(rng: np.random.Generator, inputs: int, outputs: int) -> Array:
    return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


def _zeros(count: int) -> Array:
    return np.zeros(count, np.float32)


if __name__ == "__main__":
    main()
