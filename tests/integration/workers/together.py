"""Several workers of one session, each in a thread of its own with a client of its own."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import stepwire

__all__ = ["PATIENCE_SECONDS", "exact_mean", "gradients", "joined", "together"]

PATIENCE_SECONDS = 240.0  # kernels are compiled meanwhile, beside other tests
_T = TypeVar("_T")
Gradient = dict[str, npt.NDArray[np.float32]]


def gradients(workers: int, steps: int, size: int = 300, seed: int = 0) -> list[list[Gradient]]:
    """Return gradients[worker][step]."""
    rng = np.random.default_rng(seed)
    return [[{"w": rng.standard_normal(size, np.float32)} for _ in range(steps)] for _ in range(workers)]


def exact_mean(parts: Sequence[Gradient], weights: Sequence[float] | None = None) -> Gradient:
    """Return the mean as float32; the float64 sums of these tests are exact."""
    factors = [1.0] * len(parts) if weights is None else list(weights)
    total = sum(part["w"].astype(np.float64) * factor for part, factor in zip(parts, factors, strict=True))
    return {"w": np.asarray(total / sum(factors), np.float32)}


def joined(target: str | list[str], like: Gradient, worker: int | str, **options: Any) -> stepwire.Session:
    """Make a session that several workers create together, on a client of its own."""
    client = stepwire.connect(target)
    return client.create_session(like, worker=worker, **options)  # type: ignore[arg-type]


def together(*calls: Callable[[], _T]) -> list[_T]:
    """Make all calls at once, and return their results; the first error is raised once all have ended."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        made = [threads.submit(call) for call in calls]
        concurrent.futures.wait(made, PATIENCE_SECONDS)
        return [each.result(0) for each in made]
