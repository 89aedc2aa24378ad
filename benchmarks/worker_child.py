"""One worker of several, in a process of its own.

`python worker_child.py KIND SIZE DTYPE RANK WORKERS PLACE` prepares a worker and prints "ready". For each line with a
number it takes part in so many rounds, and prints "done".

- `tcp`, `shm`: a session of stepwire at the target PLACE; with float32 over `shm` in place.
- `few`: as `tcp`, and a round needs one worker less than there are.
- `gloo`: an all-reduce of `torch.distributed`, and a step of torch's fused Adam in each process; PLACE is a file that
  the processes meet in.
- `ray`: an actor that adds the gradients up and steps torch's fused Adam; PLACE is the address of Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import variants

__all__ = ["Place"]

Round = Callable[[], Any]


class Place(NamedTuple):
    """The place of a worker.

    Attributes:
        size: the number of parameters.
        dtype: the wire dtype of gradients and replies.
        rank: the index of the worker.
        workers: the number of workers.
        at: the target, the file or the address where they meet.
    """

    size: int
    dtype: str
    rank: int
    workers: int
    at: str


def main() -> None:
    """Take part in rounds until standard input ends."""
    kind, size, dtype, rank, workers, at = sys.argv[1:]
    round_of = _KINDS[kind](Place(int(size), dtype, int(rank), int(workers), at))
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            round_of()
        print("done", flush=True)


def _session(transport: str, *, fewer: int = 0) -> Callable[[Place], Round]:
    def prepare(place: Place) -> Round:
        import stepwire

        client = stepwire.connect(place.at, transport=transport, timeout=120.0)
        session: Any = client.create_session(
            {"w": variants.parameters_of(place.size)},
            aggregation=stepwire.Aggregation(workers=place.workers, required_workers=place.workers - fewer),
            worker=place.rank,
            request_id=f"bench-{place.size}-{place.dtype}-{transport}-{fewer}",
            gradient_dtype=place.dtype,
            reply_dtype=place.dtype,
        )
        session.attach()
        if transport == "shm":
            gradient = session.shared_gradients()
            gradient["w"][:] = variants.gradient_of(place.size)
            shown = session.shared_parameters()
            return lambda: session.step(gradient, out=shown)
        given = {"w": variants.gradient_of(place.size).astype(_numpy(place.dtype))}
        out = {"w": np.zeros(place.size, _numpy(place.dtype))}
        return lambda: session.step(given, out=out)

    return prepare


def _numpy(dtype: str) -> Any:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _gloo(place: Place) -> Round:
    import torch
    import torch.distributed

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(max(len(os.sched_getaffinity(0)) // place.workers, 1))
    torch.distributed.init_process_group("gloo", f"file://{place.at}", rank=place.rank, world_size=place.workers)
    parameter = torch.nn.Parameter(torch.from_numpy(variants.parameters_of(place.size)))
    optimizer = torch.optim.Adam([parameter], fused=True)
    gradient = torch.from_numpy(variants.gradient_of(place.size).copy())
    wire = gradient.to(getattr(torch, place.dtype))
    parameter.grad = torch.empty_like(parameter)

    def round_of() -> None:
        wire.copy_(gradient)
        torch.distributed.all_reduce(wire)
        parameter.grad.copy_(wire).div_(place.workers)
        optimizer.step()

    return round_of


class Rounds:
    """An actor with parameters that steps once it has the gradients of all workers."""

    def __init__(self, parameters: Any, workers: int, threads: int) -> None:
        import asyncio

        import torch

        torch.set_num_threads(threads)
        self._torch, self._workers = torch, workers
        self._parameter = torch.nn.Parameter(torch.tensor(parameters))
        self._optimizer = torch.optim.Adam([self._parameter], fused=True)
        self._sum = torch.zeros_like(self._parameter)
        self._count, self._over = 0, asyncio.Event()

    async def step(self, gradient: Any) -> Any:
        """Add a gradient, `(n,) float32`, and return the parameters after its round."""
        import asyncio

        self._sum += self._torch.from_numpy(gradient)
        self._count += 1
        over = self._over
        if self._count < self._workers:
            await over.wait()
        else:
            self._parameter.grad = self._sum.div_(self._workers)
            self._optimizer.step()
            self._sum.zero_()
            self._count, self._over = 0, asyncio.Event()
            over.set()
        return self._parameter.detach().numpy()


def _ray(place: Place) -> Round:
    import logging

    import ray  # type: ignore[import-not-found, unused-ignore]

    ray.init(address=place.at, namespace="bench", log_to_driver=False, logging_level=logging.ERROR)
    threads, parameters = len(os.sched_getaffinity(0)), variants.parameters_of(place.size)
    options = {"name": f"rounds-{place.size}", "get_if_exists": True, "num_cpus": 0, "max_concurrency": 64}
    server = ray.remote(Rounds).options(**options).remote(parameters, place.workers, threads)
    gradient, own = variants.gradient_of(place.size), variants.parameters_of(place.size)
    return lambda: np.copyto(own, ray.get(server.step.remote(ray.put(gradient))))


_KINDS: dict[str, Callable[[Place], Round]] = {
    "tcp": _session("tcp"),
    "shm": _session("shm"),
    "few": _session("tcp", fewer=1),
    "gloo": _gloo,
    "ray": _ray,
}

if __name__ == "__main__":
    main()
