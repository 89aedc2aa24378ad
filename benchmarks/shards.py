"""The cost of a model over several servers, and a prediction for 64 of them.

The servers of one machine share its processors and its loopback, so a perfect split of a step over s processes takes
as long as the step of one. What s processes take beyond that is their overhead. The model of a step's time is

    t(s) = max over shards of (bytes of the shard / rate) + round trip + s · cost of a shard  [+ a decision]

and its last terms are fitted by least squares to steps of tiny shards, whose bytes take no time. The first term is
that of one shard beyond its round trip, since all bytes pass through one machine. The large steps, which the fit has
not seen, are compared with the model.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

import stepwire
from stepwire_server.processes.spawn import server_processes
from timing import times_of

__all__ = ["OVERHEAD_GOAL", "Scale", "fitted", "model_of", "overhead_of", "shards"]

Figures = dict[str, Any]

OVERHEAD_GOAL: Final = "predicted overhead of 64 shards"
_COUNTS: Final = (1, 2, 4, 8)
_TINY: Final = 1_000
_FAR: Final = 64
_FAR_PARAMETERS: Final = 1_000_000_000
_TEN_GIGABITS: Final = 1.25e9
"""Bytes a second of a network card, in each direction."""
_BYTES: Final = 4


class Scale(NamedTuple):
    """The parameters of the whole model, the rounds, and the steps of tiny shards in each."""

    parameters: int = 32_000_000
    rounds: int = 7
    batch: int = 100

    @classmethod
    def quick(cls) -> Scale:
        """Return a short form, for checking the benchmark."""
        return cls(80_000, 2, 3)


def shards(scale: Scale) -> Figures:
    """Measure steps over 1 to 8 processes: large ones, tiny ones, and tiny ones that decide together."""
    large, tiny, deciding = dict[int, float](), dict[int, float](), dict[int, float]()
    for count in _COUNTS:
        with server_processes(count, "--device", "cpu") as servers, contextlib.ExitStack() as stack:
            client = stack.enter_context(stepwire.connect(list(servers.targets), transport="tcp"))
            part = scale.parameters // count
            large[count] = _median(stack, client, count, part, scale.rounds, {})
            steps = scale.rounds * scale.batch
            tiny[count] = _median(stack, client, count, _TINY, steps, {})
            deciding[count] = _median(stack, client, count, _TINY, steps, {"clip_grad_norm": 1.0})
    figures: Figures = {"parameters": scale.parameters, "rounds": scale.rounds}
    for count in _COUNTS:
        figures |= {
            f"{count} shards ms": large[count] * 1e3,
            f"{count} shards to a perfect split": large[count] / large[1],
            f"{count} tiny shards ms": tiny[count] * 1e3,
            f"{count} tiny shards with a decision ms": deciding[count] * 1e3,
        }
    trip, each = fitted(tiny)
    trip_deciding, each_deciding = fitted(deciding)
    modelled = model_of(large[1], trip, each)
    return (
        figures
        | {f"{count} shards to the model": large[count] / modelled(count) for count in _COUNTS}
        | {
            "round trip ms": trip * 1e3,
            "a shard ms": each * 1e3,
            "decision ms": (trip_deciding - trip) * 1e3,
            "decision a shard ms": (each_deciding - each) * 1e3,
            OVERHEAD_GOAL: overhead_of(trip, each),
            f"{OVERHEAD_GOAL} with a decision": overhead_of(trip_deciding, each_deciding),
        }
    )


def fitted(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return the constant and the slope of the line that is nearest to some times, by least squares.

    No round trip takes less than no time: where processes share processors, the nearest line of all may say so.

    Args:
        seconds: the time by the number of shards; two numbers or more.
    """
    counts: Sequence[int] = list(seconds)
    slope, constant = np.polyfit(counts, [seconds[count] for count in counts], 1)
    if constant < 0.0:
        slope = sum(count * seconds[count] for count in counts) / sum(count * count for count in counts)
    return max(float(constant), 0.0), float(slope)


def model_of(alone: float, trip: float, each: float) -> Callable[[int], float]:
    """Return the model of a large step on one machine: its seconds by the number of shards.

    Args:
        alone: the step of one shard, in seconds.
        trip: the round trip, in seconds.
        each: the cost of a shard, in seconds.
    """
    transfer = alone - trip - each
    return lambda count: transfer + trip + count * each


def overhead_of(trip: float, each: float, *, count: int = _FAR, parameters: int = _FAR_PARAMETERS) -> float:
    """Return the predicted overhead of a step over many shards, as a part of its transfer.

    The client's card has all bytes of float32, in each direction one after the other, and each shard's card a part.
    So the client's is the slowest. Overlap would halve the transfer, and double the part.

    Args:
        trip: the round trip, in seconds.
        each: the cost of a shard, in seconds.
        count: the number of shards.
        parameters: those of the whole model.
    """
    transfer = 2 * parameters * _BYTES / _TEN_GIGABITS
    return (trip + count * each) / transfer


def _median(
    stack: contextlib.ExitStack, client: stepwire.Client, count: int, part: int, rounds: int, options: dict[str, Any]
) -> float:
    """Return the median seconds of a step whose model has a tensor for each shard."""
    gradient = {f"w{shard}": np.full(part, 0.01, np.float32) for shard in range(count)}
    out = {name: np.empty_like(values) for name, values in gradient.items()}
    session = stack.enter_context(client.create_session(gradient, **options))
    times_of(lambda: session.step(gradient, out=out), 2)
    return statistics.median(times_of(lambda: session.step(gradient, out=out), rounds))
