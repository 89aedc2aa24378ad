"""Four workers on one model: rounds beside their parts, and beside an all-reduce with a local step."""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

import contest
import floors
import ray_actor
import variants
from child import Child, child, python
from contest import Action, Contender, Ratios
from echo import EchoTargets
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines.cpu.engine import CpuEngine

__all__ = ["RATIOS", "WORKERS", "crew", "straggler", "workers"]

WORKERS: Final = 4
_ADD: Final = "accumulate"
_COPY: Final = "copy of a gradient"
_MEAN: Final = "mean"
_NORM: Final = "norm of a gradient"
_PUSH_PULL: Final = "raw gRPC push, pull of bfloat16"
_OURS: Final = {"tcp float32": ("tcp", "float32"), "tcp bfloat16": ("tcp", "bfloat16"), "shm": ("shm", "float32")}
_GLOO: Final = {"gloo float32": ("gloo", "float32"), "gloo bfloat16": ("gloo", "bfloat16")}

RATIOS: Ratios = {
    "accumulate to a copy": (_ADD, (_COPY,)),
    "tcp bfloat16 to 4 pushes, a step, 4 pulls": ("tcp bfloat16", (*[_PUSH_PULL] * WORKERS, floors.ENGINE)),
    "shm to its copies and passes": (
        "shm",
        (*[_COPY] * WORKERS, *[_NORM] * WORKERS, *[_ADD] * WORKERS, _MEAN, _NORM, floors.ENGINE),
    ),
    "shm to gloo float32": ("shm", ("gloo float32",)),
    "tcp bfloat16 to gloo bfloat16": ("tcp bfloat16", ("gloo bfloat16",)),
    "shm to Ray actor": ("shm", ("Ray actor",)),
}


def workers(target: str, echo: EchoTargets, *, size: int, rounds: int) -> dict[str, Any]:
    """Return the times of a round of four workers, those of its parts and of its peers, and the ratios.

    Args:
        target: a server.
        echo: the raw gRPC server.
        size: the number of parameters.
        rounds: the rounds of the contest.
    """
    entrants = [
        *(crew(name, kind, dtype, target) for name, (kind, dtype) in _OURS.items()),
        *(crew(name, kind, dtype) for name, (kind, dtype) in _GLOO.items()),
        Contender("Ray actor", _ray),
        *_parts(echo),
    ]
    result, repeats = contest.run_contest(entrants, size, rounds=rounds, batch=1), contest.batch_of(size)
    result = result._replace(times={name: [each / repeats for each in times] for name, times in result.times.items()})
    return result.figures() | result.ratios(RATIOS)


def crew(name: str, kind: str, dtype: str, place: str = "") -> Contender:
    """Return a round of several processes; see `worker_child`."""

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        at = place or str(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting")
        threads = stack.enter_context(ThreadPoolExecutor(WORKERS))
        group = [stack.enter_context(_child(kind, size, dtype, rank, at)) for rank in range(WORKERS)]
        _ready(threads, group)
        return _Rounds(group, threads, contest.batch_of(size))

    return Contender(name, prepare)


def _ray(stack: contextlib.ExitStack, size: int) -> Action:
    """Prepare a round of processes that give their gradients to one actor."""
    address = ray_actor.started(stack).get_runtime_context().gcs_address
    return crew("Ray actor", "ray", "float32", address).prepare(stack, size)


class _Rounds:
    """Some rounds at once, so that waking the processes costs little beside them."""

    def __init__(self, group: Sequence[Child], threads: ThreadPoolExecutor, repeats: int) -> None:
        self._group = group
        self._threads = threads
        self._repeats = repeats

    def __call__(self) -> None:
        list(self._threads.map(lambda each: each.ask(str(self._repeats)), self._group))


def _parts(echo: EchoTargets) -> list[Contender]:
    """Return the parts of a round, each as often as the processes' rounds are repeated."""
    push_pull = next(each for each in floors.grpc_floors(echo) if each.name == "raw gRPC push, pull")

    def halves(stack: contextlib.ExitStack, size: int) -> Action:
        return push_pull.prepare(stack, size * BFLOAT16.itemsize // FLOAT32.itemsize)

    engine = next(each for each in floors.parts() if each.name == floors.ENGINE)
    parts = {_COPY: _copy, _NORM: _norm, _ADD: _add, _MEAN: _mean, _PUSH_PULL: halves, floors.ENGINE: engine.prepare}
    return [Contender(name, _repeated(prepare)) for name, prepare in parts.items()]


def _repeated(prepare: Any) -> Any:
    def prepared(stack: contextlib.ExitStack, size: int) -> Action:
        action, repeats = prepare(stack, size), contest.batch_of(size)

        def run() -> None:
            for _ in range(repeats):
                action()

        return run

    return prepared


def _copy(stack: contextlib.ExitStack, size: int) -> Action:
    source, target = variants.gradient_of(size), np.ones(size, FLOAT32)
    return lambda: np.copyto(target, source)


def _norm(stack: contextlib.ExitStack, size: int) -> Action:
    state = _engine(stack).staging(size)
    staged = state.receive().put(0, variants.gradient_of(size))
    return lambda: state.sum_of_squares(staged, 0, size, 1.0).wait()


def _add(stack: contextlib.ExitStack, size: int) -> Action:
    engine = _engine(stack)
    total, staged = engine.exact_sum(size), engine.staging(size).receive().put(0, variants.gradient_of(size))
    total.add(0, staged, 0, size, 1.0)  # the first one stores
    return lambda: total.add(0, staged, 0, size, 1.0)


def _mean(stack: contextlib.ExitStack, size: int) -> Action:
    engine = _engine(stack)
    total, staged = engine.exact_sum(size), engine.staging(size).receive().put(0, variants.gradient_of(size))

    def divide() -> None:
        total.clear()
        total.mean(float(WORKERS))

    total.add(0, staged, 0, size, 1.0)
    return divide


def _engine(stack: contextlib.ExitStack) -> CpuEngine:
    engine = CpuEngine(threads=len(os.sched_getaffinity(0)))
    stack.callback(engine.close)
    return engine


def straggler(target: str, *, size: int, rounds: int) -> dict[str, Any]:
    """Return the time of rounds that need three workers of four: without the fourth, and with a tenfold slower one.

    Args:
        target: a server.
        size: the number of parameters.
        rounds: the rounds of each kind.
    """
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(WORKERS))
        fast = [stack.enter_context(_child("few", size, "float32", rank, target)) for rank in range(WORKERS - 1)]
        _ready(threads, fast)
        together = _Rounds(fast, threads, 1)
        alone = [contest.timed(together) for _ in range(rounds + 1)][1:]
        slow = stack.enter_context(_child("few", size, "float32", WORKERS - 1, target))
        _ready(threads, [slow])
        over = threading.Event()
        dawdling = threads.submit(_dawdle, slow, 10.0 * statistics.median(alone), over)
        try:
            beside = [contest.timed(together) for _ in range(rounds + 1)][1:]
        finally:
            over.set()
        dawdling.result()
    medians = {"alone": statistics.median(alone), "beside a straggler": statistics.median(beside)}
    return {f"3 of 4 {name} ms": seconds * 1e3 for name, seconds in medians.items()} | {
        "rounds beside a straggler to rounds without": medians["beside a straggler"] / medians["alone"]
    }


def _dawdle(slow: Child, seconds: float, over: threading.Event) -> None:
    """Take part in a round now and then."""
    while not over.wait(seconds):
        slow.ask("1")


def _child(kind: str, size: int, dtype: str, rank: int, at: str) -> contextlib.AbstractContextManager[Child]:
    script = pathlib.Path(__file__).with_name("worker_child.py")
    return child(python(script, kind, size, dtype, rank, WORKERS, at))


def _ready(threads: ThreadPoolExecutor, group: Sequence[Child]) -> None:
    if [*threads.map(Child.read, group)] != ["ready"] * len(group):
        raise RuntimeError("a worker is not ready")
