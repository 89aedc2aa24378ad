"""Handwritten digits in NumPy: Adam on a stepwire server beside a float64 Adam in this process.

    pip install '.[demo]'
    python examples/digits_numpy.py [--target HOST:PORT] [--quick]

The model, its written-out gradients and the float64 Adam are those of `stepwire demo`, which feeds both optimizers the
same gradients. The runs are independent, so that a difference at one step is in the gradients of all later steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import numpy as np

import stepwire
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from stepwire_server.demo import MLP, Digits, Parameters, ReferenceAdam

SEED = 7
LR = 3e-3


def train(
    model: MLP, digits: Digits, step: Callable[[Parameters], Parameters], steps: Iterable[int]
) -> dict[int, float]:
    """Train a model and return the loss at each step; `step` returns new parameters for gradients."""
    rng, losses = np.random.default_rng(SEED), {}
    for number in steps:
        losses[number], gradients = model.loss_and_gradients(*digits.batch(rng))
        model.parameters = step(gradients)
    return losses


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=600, quick_steps=60, plot="digits-numpy.png")
    digits, steps = Digits.load(), range(1, options.steps + 1)
    local, remote = (MLP((64, 64, 10), np.random.default_rng(SEED)) for _ in range(2))
    adam = ReferenceAdam(local.parameters, LR)

    def local_step(gradients: Parameters) -> Parameters:
        adam.step(gradients)
        return adam.parameters

    with progress_bar(options) as bar:
        local_losses = train(local, digits, local_step, bar.track(steps, description="local float64 Adam"))
        with a_server(options.target) as target, stepwire.connect(target) as client:
            adam_there = stepwire.Adam(lr=LR)
            with client.create_session(remote.parameters, optimizer=adam_there, label="digits in NumPy") as session:
                losses = train(remote, digits, session.step, bar.track(steps, description="stepwire"))
                transport = session.transport.name

    apart = abs(losses[options.steps] - local_losses[options.steps])
    return Comparison(
        title="Digits MLP in NumPy: Adam, local and on a server",
        curves={"local float64": local_losses, "stepwire": losses},
        facts={
            "transport": transport,
            "test accuracy, local": local.accuracy(digits.test_x, digits.test_y),
            "test accuracy, stepwire": remote.accuracy(digits.test_x, digits.test_y),
            "largest difference of a parameter": adam.largest_difference(remote.parameters),
            "difference of the last losses": apart,
        },
        checks={"the last losses differ by less than 1e-4": apart < 1e-4},
    ).show(options)


if __name__ == "__main__":
    sys.exit(main())
