"""Small steps of the drop-in for torch on a compiled lane, beside torch's own optimizers and a doorbell.

The model has ten tensors of some 10,000 parameters. Each contender steps in its turn, in one run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Final

import lane
import lane_python
from contest import Action, Contender, Ratios, needed, run_contest
from doorbell import Doorbell

__all__ = ["DEFAULT_GOAL", "RATIOS", "VIEWS_GOAL", "lane_torch"]

VIEWS_GOAL: Final = "views to fused and a doorbell"
DEFAULT_GOAL: Final = "drop-in to torch default"
RATIOS: Final[Ratios] = {
    VIEWS_GOAL: ("views", ("local torch fused", "doorbell")),
    DEFAULT_GOAL: ("drop-in", ("local torch default",)),
}


def lane_torch(
    target: str, doorbell: str, *, rounds: int, batch: int, compiling_seconds: float = 20.0
) -> dict[str, Any]:
    """Return the times of a step in milliseconds, and the ratios, of medians round by round.

    Args:
        target: of a server with compiled lanes.
        doorbell: the path of the doorbell.
        rounds: the turns of every contender.
        batch: the steps of a turn.
        compiling_seconds: the longest time that a loop is compiled in.
    """

    def ring(stack: contextlib.ExitStack, size: int) -> Action:
        return stack.enter_context(contextlib.closing(Doorbell(doorbell))).ring

    contenders = (
        Contender("doorbell", ring),
        Contender("views", _ours(target, compiling_seconds, shared_views=True)),
        Contender("drop-in", _ours(target, compiling_seconds)),
        *lane_python.LOCAL,
    )
    result = run_contest(contenders, lane_python.PARAMETERS, rounds=rounds, batch=batch)
    return result.figures() | {"batch": batch} | result.ratios(RATIOS)


def _ours(target: str, compiling_seconds: float, **options: Any) -> Callable[[contextlib.ExitStack, int], Action]:
    """Return the steps of the drop-in, whose loop is there before the first of them."""

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        needed("torch")
        from stepwire.torch import Adam

        make = functools.partial(Adam, server=target, transport="packets", **options)
        optimizer = lane_python.optimizer_of(make)
        stack.enter_context(contextlib.closing(optimizer))
        step: Action = optimizer.step
        lane.looped(step, compiling_seconds)
        return step

    return prepare
