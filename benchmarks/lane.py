"""Small steps on one host: lanes beside a bare doorbell, a raw gRPC echo, and torch in the client's process.

A training program computes between two steps, and both processes sleep meanwhile. So every contender is measured with
pauses between its calls too. A pause is not part of the time.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import local_torch
import transports
import variants
from contest import PAUSE_SECONDS, Absent, Action, Contender, timed
from doorbell import Doorbell
from echo import EchoStream, sized_message
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.rpc.lane_gate import AFTER_STEPS
from variants import Variant

__all__ = [
    "COMPILED_DOORBELL_GOAL",
    "COMPILED_ECHO_GOAL",
    "COMPILED_TORCH_GOAL",
    "ECHO_GOAL",
    "Scale",
    "Targets",
    "lane",
    "looped",
]

_DOORBELL, _ECHO, _FUSED = "doorbell", "gRPC echo", "local torch fused"
_STEPS = (
    Variant("packets", "packets"),
    Variant("packets in place", "packets", in_place=True),
    Variant("shm in place", "shm", in_place=True),
)
_COMPILED = (Variant("compiled", "packets"), Variant("compiled in place", "packets", in_place=True))
_SPINNING = Variant("spinning in place", "packets", in_place=True)
"""On a compiled lane, both of whose ends wait awake for a moment."""

_MOMENT = {"STEPWIRE_LANE_SPIN_MICROSECONDS": "50"}
_NOTHING: Mapping[str, str] = MappingProxyType({})
_LOOP_STEPS = AFTER_STEPS + 16
"""More steps than a session makes before a loop is compiled for it, or looked for again."""
_FLOORS = (_DOORBELL, _ECHO, _FUSED)
ECHO_GOAL = f"packets 1k, 0 ms to {_ECHO}"
"""The ratio of the packet lane to the echo, without a pause."""

COMPILED_ECHO_GOAL = f"compiled 1k, 0 ms to {_ECHO}"
COMPILED_DOORBELL_GOAL = f"compiled in place 1k, 0 ms to {_DOORBELL}"
COMPILED_TORCH_GOAL = f"compiled in place 1k, 0 ms to {_FUSED}"
"""The ratios of the compiled lane to the floors, without a pause."""


class Targets(NamedTuple):
    """The servers.

    Attributes:
        plain: the target of a server without compiled lanes.
        compiled: the target of one with compiled lanes.
        spinning: the target of one whose loops wait awake for a moment.
        echo: the target of raw gRPC streams.
        doorbell: the path of the doorbell.
    """

    plain: str
    compiled: str
    spinning: str
    echo: str
    doorbell: str


class Scale(NamedTuple):
    """The extent of a measurement.

    Attributes:
        sizes: the numbers of parameters.
        gaps: the pauses between two calls, in milliseconds.
        rounds: the turns of every contender.
        batch: the calls of a turn.
        compiling_seconds: the longest time that a loop is compiled in, on a machine without a kernel cache.
    """

    sizes: tuple[int, ...] = (1_000, 10_000)
    gaps: tuple[float, ...] = (0, 0.2, 2)
    rounds: int = 15
    batch: int = 60
    compiling_seconds: float = 20.0

    @classmethod
    def quick(cls) -> Scale:
        """Return a short form, to check the benchmark itself."""
        return cls((1_000,), (0, 0.2), 2, 10, 0.1)


def lane(targets: Targets, scale: Scale) -> dict[str, Any]:
    """Return the times of each contender by size and pause, and the ratios to the floors, of medians round by round.

    Args:
        targets: the servers.
        scale: the extent.
    """
    figures: dict[str, Any] = {"rounds": scale.rounds, "batch": scale.batch}
    for size in scale.sizes:
        with contextlib.ExitStack() as stack:
            ready = _prepared(stack, _contenders(targets, scale.compiling_seconds), size, figures)
            for gap in scale.gaps:
                place = f"{transports.section_name('', size).strip()}, {gap:g} ms"
                figures |= _figures(_times(ready, gap / 1e3, scale), place)
    return figures


def _contenders(targets: Targets, compiling_seconds: float) -> list[Contender]:
    def ring(stack: contextlib.ExitStack, size: int) -> Action:
        return stack.enter_context(contextlib.closing(Doorbell(targets.doorbell))).ring

    def echoed(stack: contextlib.ExitStack, size: int) -> Action:
        stream = stack.enter_context(contextlib.closing(EchoStream(targets.echo, "Echo")))
        message = sized_message(size * FLOAT32.itemsize, size * FLOAT32.itemsize)
        return lambda: stream.round_trip(message)

    fused = next(each for each in local_torch.contenders() if each.name == _FUSED)
    steps = [variants.contender(variant, [targets.plain]) for variant in _STEPS]
    compiled = [_compiled(variant, targets.compiled, compiling_seconds) for variant in _COMPILED]
    compiled.append(_compiled(_SPINNING, targets.spinning, compiling_seconds, _MOMENT))
    return [Contender(_DOORBELL, ring), Contender(_ECHO, echoed), fused, *steps, *compiled]


def _compiled(
    variant: Variant, target: str, compiling_seconds: float, environment: Mapping[str, str] = _NOTHING
) -> Contender:
    """Return the steps of a variant on a compiled lane, whose loop is there before the first of them.

    Args:
        variant: the variant.
        target: of the server.
        compiling_seconds: the longest time that a loop is compiled in.
        environment: the variables with which the client opens its lane.
    """

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        with mock.patch.dict(os.environ, environment):
            step = variants.contender(variant, [target]).prepare(stack, size)
            step()
        looped(step, compiling_seconds)
        return step

    return Contender(variant.name, prepare)


def looped(step: Action, compiling_seconds: float) -> None:
    """Make steps until their session has a compiled loop."""
    for pause_seconds in (compiling_seconds, 0.0):
        for _ in range(_LOOP_STEPS):
            step()
        time.sleep(pause_seconds)


def _prepared(
    stack: contextlib.ExitStack, contenders: Sequence[Contender], size: int, figures: dict[str, Any]
) -> dict[str, Action]:
    """Return the actions of those that can run here; the others are told among the figures."""
    ready: dict[str, Action] = {}
    for contender in contenders:
        try:
            ready[contender.name] = contender.prepare(stack, size)
        except Absent as reason:
            figures[f"{contender.name} left out"] = str(reason)
    return ready


def _times(ready: dict[str, Action], gap_seconds: float, scale: Scale) -> dict[str, list[list[float]]]:
    """Return the seconds of every call, by contender and round; the calls before the first round are not counted."""
    times: dict[str, list[list[float]]] = {name: [] for name in ready}
    for _ in range(scale.rounds + 1):
        for name, action in ready.items():
            time.sleep(PAUSE_SECONDS)
            times[name].append([_after(gap_seconds, action) for _ in range(scale.batch)])
    return {name: rounds[1:] for name, rounds in times.items()}


def _after(gap_seconds: float, action: Action) -> float:
    if gap_seconds:
        time.sleep(gap_seconds)
    return timed(action)


def _figures(times: dict[str, list[list[float]]], place: str) -> dict[str, float]:
    medians = {name: [statistics.median(batch) for batch in rounds] for name, rounds in times.items()}
    figures: dict[str, float] = {}
    for name, rounds in times.items():
        calls = np.concatenate(rounds) * 1e6
        figures[f"{name} {place} p50 us"] = float(np.percentile(calls, 50))
        figures[f"{name} {place} p99 us"] = float(np.percentile(calls, 99))
    for variant in (*_STEPS, *_COMPILED, _SPINNING):
        for floor in (floor for floor in _FLOORS if floor in medians):
            pairs = zip(medians[variant.name], medians[floor], strict=True)
            figures[f"{variant.name} {place} to {floor}"] = statistics.median(one / other for one, other in pairs)
    return figures
