"""Do lossy messages train as well? Final losses with each encoding of gradients and parameters, over several seeds.

    python benchmarks/wire_encodings.py [--quick] [--only TASK …] [--json FILE]

A real server steps the tasks of `convergence.py`; everything but the encoding is the same for a seed. The gradient is
computed from the parameters of the reply, in its encoding, as on a client.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import stepwire
from convergence import Task, digits, language_model
from stepwire_server.processes.spawn import server_process

__all__ = ["ENCODINGS", "Encoding", "compare", "main"]

_STEP: Mapping[str, Any] = types.MappingProxyType({})


class Encoding(NamedTuple):
    """The encoding of messages.

    Attributes:
        name: the name of its figures.
        session: the options of the session.
        step: the options of every step.
    """

    name: str
    session: Mapping[str, Any]
    step: Mapping[str, Any] = _STEP


_INT8 = {"gradient_dtype": "int8", "reply_dtype": "bfloat16"}
ENCODINGS = (
    Encoding("float32", {}),
    Encoding("bfloat16", {"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16"}),
    Encoding("float16", {"gradient_dtype": "float16", "reply_dtype": "float16"}),
    Encoding("int8 up", {"gradient_dtype": "int8"}),
    Encoding("int8 up, bfloat16 down", _INT8),
    Encoding("int8 up with error feedback, bfloat16 down", {**_INT8, "error_feedback": True}),
    Encoding("bfloat16, changes only", {"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16"}, {"reply": "changed"}),
)
"""All encodings; the others are compared with the first."""

# The function that makes a task, and its steps in the short form and in the full form.
_TASKS = {"digits": (digits, 20, 800), "language_model": (language_model, 5, 1500)}


def final_loss(client: stepwire.Client, task: Task, encoding: Encoding, seed: int, steps: int) -> float:
    """Train once and return the loss of the server's own parameters on held-out data."""
    rng = np.random.default_rng(seed)
    parameters: Any = task.initial(rng)
    schedule = stepwire.Schedule.cosine(steps, warmup_steps=steps // 20, final_factor=0.05)
    create: Any = client.create_session
    with create(parameters, optimizer=stepwire.Adam(lr=task.lr), schedule=schedule, **encoding.session) as session:
        for inputs, targets in task.batches(rng, steps):
            gradients = task.loss(parameters, inputs, targets)[1]
            received = session.step(gradients, **encoding.step)
            parameters = {name: value.astype(np.float32) for name, value in received.items()}
        held = session.pull()
    return task.loss(held, *task.held_out)[0]


def compare(losses: Mapping[str, list[float]]) -> dict[str, float]:
    """Return mean and spread of each encoding's losses, and of their differences to the first's, seed by seed."""
    figures: dict[str, float] = {}
    exact = next(iter(losses))
    for name, values in losses.items():
        figures |= {f"{name}: mean": statistics.mean(values), f"{name}: deviation": statistics.stdev(values)}
        if name != exact:
            differences = [a - b for a, b in zip(values, losses[exact], strict=True)]
            figures[f"{name}: difference"] = statistics.mean(differences)
            figures[f"{name}: difference_deviation"] = statistics.stdev(differences)
    return figures


def main() -> None:
    """Run both tasks and print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--only", nargs="*", default=tuple(_TASKS), choices=_TASKS, metavar="TASK", help="default: all")
    arguments = parser.parse_args()
    seeds = 2 if arguments.quick else 5
    results = {}
    with server_process("--device", "cpu") as server, stepwire.connect(server.target, transport="tcp") as client:
        for name in arguments.only:
            make, quick_steps, full_steps = _TASKS[name]
            task, count = make(), quick_steps if arguments.quick else full_steps
            losses = {
                encoding.name: [final_loss(client, task, encoding, seed, count) for seed in range(seeds)]
                for encoding in ENCODINGS
            }
            results[name] = {"seeds": seeds, "steps": count, **compare(losses)}
            print(name)
            for figure, value in results[name].items():
                print(f"  {figure:<62} {value:.5f}" if isinstance(value, float) else f"  {figure:<62} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
