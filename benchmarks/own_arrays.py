"""A large step with a user's own arrays over shared memory, beside one in place and beside torch in the same process.

A user's own gradient and parameters are copied each way. A reply without `out` is written to memory that the user has
let go of, so that it costs no page that is new to the process: the figures of page faults tell.
"""

from __future__ import annotations

import contextlib
import functools
import resource
from collections.abc import Callable
from typing import Any

import contest
import floors
import local_torch
import variants
from contest import Action, Contender, Ratios

__all__ = ["RATIOS", "own_arrays"]

_FUSED = "local torch fused"
RATIOS: Ratios = {
    "new arrays to fused": ("new arrays", (_FUSED,)),
    "out to fused": ("out", (_FUSED,)),
    "no reply to fused": ("no reply", (_FUSED,)),
    "in place to fused": ("in place", (_FUSED,)),
    "new arrays to its parts": ("new arrays", (floors.ENGINE, floors.COPIES)),
}
_FAULTS_STEPS = 4


def own_arrays(target: str, *, size: int, rounds: int) -> dict[str, Any]:
    """Run the contest, and count the client's page faults of each way to step."""
    ways = {
        "new arrays": _new_arrays,
        "out": functools.partial(_variant, name="shm"),
        "no reply": _no_reply,
        "in place": functools.partial(_variant, name="shm in place"),
    }
    steps = {name: functools.partial(way, target) for name, way in ways.items()}
    entrants = [
        *(each for each in local_torch.contenders() if each.name == _FUSED),
        *(Contender(name, prepare) for name, prepare in steps.items()),
        *floors.parts(),
    ]
    result = contest.run_contest(entrants, size, rounds=rounds, batch=contest.batch_of(size))
    faults = {f"{name} page faults": _faults(prepare, size) for name, prepare in steps.items()}
    return result.figures() | result.ratios(RATIOS) | faults


def _new_arrays(target: str, stack: contextlib.ExitStack, size: int) -> Action:
    """Return a step whose reply is bound to a name, as in a loop of training."""
    session = variants.open_job(stack, variants.named("shm"), [target], size).session
    gradient, kept = {"w": variants.gradient_of(size)}, dict[str, Any]()

    def step() -> None:
        kept["parameters"] = session.step(gradient)

    return step


def _no_reply(target: str, stack: contextlib.ExitStack, size: int) -> Action:
    session = variants.open_job(stack, variants.named("shm"), [target], size).session
    gradient = {"w": variants.gradient_of(size)}
    return lambda: session.step(gradient, reply="none")


def _variant(target: str, stack: contextlib.ExitStack, size: int, *, name: str) -> Action:
    return variants.open_job(stack, variants.named(name), [target], size).step


def _faults(prepare: Callable[[contextlib.ExitStack, int], Action], size: int) -> float:
    """Return the pages of a step that were new to this process, once it has stepped before."""
    with contextlib.ExitStack() as stack:
        step = prepare(stack, size)
        for _ in range(3):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(_FAULTS_STEPS):
            step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / _FAULTS_STEPS
