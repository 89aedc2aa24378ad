"""The Python of the CUDA engine for each piece of a gradient and of a reply, on a CuPy that does nothing.

    python benchmarks/gpu_python.py [--quick]

A piece of 4 MiB crosses a bus of 55 GB/s in 76 µs, and a piece of 16 MiB in 305 µs. So that the bus is never idle,
Python and CuPy together have to ask for a piece in less time. CuPy's own calls are not in these figures, which the
processor of this machine decides.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import machine
from gpu_sections import ADAM, adam_pass, adam_slots
from idle_cupy import IdleCupy
from stepwire_server.engines import CudaEngine
from stepwire_server.rules import Precision, Recipe
from stepwire_server.steps.reply import ReplyPipeline

__all__ = ["Trip", "main", "measure", "report"]

_PIECES = {"4 MiB": 1 << 20, "16 MiB": 4 << 20}
_RECIPES = {
    "float32": ADAM,
    "telemetry": Recipe(ADAM.rule, measures=True),
    "bfloat16": Recipe(ADAM.rule, precision=Precision.BFLOAT16),
    "int8": Recipe(ADAM.rule, precision=Precision.INT8),
}


class Trip(NamedTuple):
    """Microseconds of one thread's processor time a piece.

    Attributes:
        up: a gradient's piece on its way to the device, with its sum of squares.
        down: the update of a piece, with its reply on its way to the host.
    """

    up: float
    down: float


class _Nowhere:
    """A `ReplyWriter` whose buffers are the caller's own."""

    def buffer(self, offset: int, count: int) -> Any:
        """See `ReplyWriter`; no caller asks."""
        raise AssertionError("the passes of this benchmark have buffers of their own")

    def flush(self) -> None:
        """See `ReplyWriter`."""


def measure(recipe: Recipe, elements: int, pieces: int, rounds: int) -> Trip:
    """Step through pinned memory, and return the fastest round: other work on the machine only adds to a round."""
    size, step = elements * pieces, adam_pass(recipe)
    source, target = np.zeros(size, np.float32), np.zeros(size, np.float32)
    up, down = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", {"CUPY_CACHE_DIR": folder}))
        engine = stack.enter_context(contextlib.closing(CudaEngine(0, IdleCupy())))
        state = stack.enter_context(contextlib.closing(engine.allocate(adam_slots(recipe), size)))
        for array in (source, target):
            stack.enter_context(engine.bus.pin(array.view(np.uint8)))
        for _ in range(rounds):
            with contextlib.closing(state.receive()) as gradient:
                begun = time.thread_time()
                chunks = [gradient.put(low, source[low : low + elements]) for low in range(0, size, elements)]
                for pending in [state.sum_of_squares(chunk, 0, elements, 1.0) for chunk in chunks]:
                    pending.wait()
                received = time.thread_time()
                with ReplyPipeline(_Nowhere(), state.depth) as reply:
                    for number, chunk in enumerate(chunks):
                        low = number * elements
                        out = target[low : low + elements]
                        reply.add([state.update(step, low, chunk, 0, elements, out)])
                ended = time.thread_time()
                state.settle()
            up.append((received - begun) / pieces * 1e6)
            down.append((ended - received) / pieces * 1e6)
    return Trip(min(up), min(down))


def report(trips: dict[tuple[str, str], Trip]) -> str:
    """Lay the figures out."""
    lines = [f"{name}: {value}" for name, value in machine.describe().items()]
    lines += ["", f"{'moments':<12}{'piece':<8}{'up µs':>8}{'down µs':>10}"]
    lines += [f"{name:<12}{piece:<8}{trip.up:>8.1f}{trip.down:>10.1f}" for (name, piece), trip in trips.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    pieces, rounds = (4, 2) if parser.parse_args().quick else (16, 60)
    print(
        report(
            {
                (name, piece): measure(recipe, elements, pieces, rounds)
                for name, recipe in _RECIPES.items()
                for piece, elements in _PIECES.items()
            }
        )
    )


if __name__ == "__main__":
    main()
