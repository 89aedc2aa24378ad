"""A peer: a common parameter server with Ray, an actor with parameters and torch's fused Adam.

The gradient goes in and the parameters come out through Ray's object store, which is shared memory. A worker then sets
its model's weights, as in the examples of Ray's documentation. A worker that reads in place uses the read-only arrays
of the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import warnings
from typing import Any

import numpy as np

import variants
from contest import Action, Contender, needed

__all__ = ["contenders", "started"]


def contenders() -> list[Contender]:
    """Return the actor with a worker that copies the parameters into its own arrays, and with one that does not."""
    return [Contender("Ray actor", _into_arrays), Contender("Ray actor, read in place", _in_place)]


class ParameterServer:
    """Parameters and their optimizer, in a process of their own."""

    def __init__(self, parameters: Any, threads: int) -> None:
        import torch  # type: ignore[import-not-found, unused-ignore]

        torch.set_num_threads(threads)  # Ray gives an actor one
        self._torch = torch
        self._parameter = torch.nn.Parameter(torch.tensor(parameters))
        self._optimizer = torch.optim.Adam([self._parameter], fused=True)

    def step(self, gradient: Any) -> Any:
        """Apply a gradient, `(n,) float32`, and return the parameters."""
        with warnings.catch_warnings():  # memory of the object store cannot be written, and is not
            warnings.simplefilter("ignore")
            self._parameter.grad = self._torch.from_numpy(gradient)
        self._optimizer.step()
        return self._parameter.detach().numpy()


def _into_arrays(stack: contextlib.ExitStack, size: int) -> Action:
    step, parameters = _in_place(stack, size), variants.parameters_of(size)
    return lambda: np.copyto(parameters, step())


def _in_place(stack: contextlib.ExitStack, size: int) -> Action:
    ray, cores = started(stack), len(os.sched_getaffinity(0))
    server = ray.remote(num_cpus=0)(ParameterServer).remote(variants.parameters_of(size), cores)
    stack.callback(ray.kill, server)
    gradient = variants.gradient_of(size)
    return lambda: ray.get(server.step.remote(ray.put(gradient)))


def started(stack: contextlib.ExitStack) -> Any:
    """Return Ray, running until the contest's end."""
    needed("torch")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = needed("ray")
    if not ray.is_initialized():
        ray.init(
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(pathlib.Path(__file__).parent)}},
        )
        stack.callback(ray.shutdown)
    return ray
