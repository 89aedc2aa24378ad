"""The next steps of a session, computed ahead as far as no gradient is needed: what a compiled lane steps by.

A step's scalars depend on t, the settings and the schedule. So the code of every other step computes those of the next
steps ahead, and none of their formulas is written again. The factor of clipping alone needs the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from stepwire.errors import StepwireError
from stepwire.optimizers import Hyperparameters
from stepwire.wire.int8_blocks import INT8
from stepwire_server.devices.fair_state import FairState
from stepwire_server.engines.cpu.lane_recipes import lane_numbers, lane_scalars, suits
from stepwire_server.engines.cpu.state import LEAST_SHARED_UPDATE, CpuState
from stepwire_server.engines.protocol import GRAIN, HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Recipe
from stepwire_server.sessions.state import SessionState
from stepwire_server.steps.tensor_steps import CountedSegment
from stepwire_server.steps.update import effective_groups, passes

__all__ = ["MOST_STEPS", "LaneBatch", "lane_batch", "may_have_lane", "steps_ahead"]

MOST_STEPS: Final = 128
"""The steps that are computed ahead at most."""

_LEAST_STEPS: Final = 8
_MOST_MEASURED: Final = 2
"""The segments whose sums of telemetry have one rounding, in whatever order they are added."""

_MOST_SUMMED: Final = 64
"""The sums of squares that may be added one by one: their roundings and the kernel's are within `RELATIVE_ERROR`."""


class LaneBatch(NamedTuple):
    """The next steps of a session.

    Attributes:
        request: the step as it is asked for, with the number of the first one.
        recipe: the arithmetic, for how the arrays are held.
        arrays: the arrays of the state.
        groups: for each step the hyper-parameters of each group.
        t: the updates that each group will have had after the first step.
        unscale: the factor of the gradient.
        segments: `(n, 2) int64`: start and size of each.
        scalars: `(steps, n, numbers) float64`; see `lane_numbers`.
        ranges: `(m, 3) int64`: start, size and group of each range whose squares are summed.
    """

    request: StepRequest
    recipe: Recipe
    arrays: tuple[HostArray, ...]
    groups: Sequence[tuple[Hyperparameters, ...]]
    t: Sequence[int]
    unscale: float
    segments: HostArray
    scalars: HostArray
    ranges: HostArray


def may_have_lane(config: SessionConfig) -> bool:
    """Tell whether the steps of a session with this config are of the common case."""
    treatment, size = config.treatment, config.layout.size
    several = config.aggregation is not None or treatment.two_phase or config.measures and len(config.groups) > 1
    scaled = treatment.accumulation_steps > 1 or treatment.loss_scaling is not None or any(config.group_clips)
    plain = config.durability.level == "memory" and not config.tables and 0 < size < LEAST_SHARED_UPDATE
    return plain and not several and not scaled and all(map(suits, map(config.recipe, config.groups)))


def steps_ahead(asked: int, computed: int, made: int) -> int:
    """Return the number of steps to compute ahead after a grant, which has computed those in vain that were not made.

    Args:
        asked: the number before.
        computed: the steps that were computed for the grant.
        made: those of them that were made.
    """
    return min(2 * asked, MOST_STEPS) if made == computed else max(min(asked, 2 * made), _LEAST_STEPS)


def lane_batch(
    config: SessionConfig, state: SessionState, request: StepRequest, most: int = MOST_STEPS
) -> LaneBatch | None:
    """Compute the next steps ahead; None where their settings, or the state, are not of the common case.

    Args:
        config: one that `may_have_lane`.
        state: the session's state, which no step is half applied to.
        request: a step as it is asked for; its number is that of the first step.
        most: the most steps.
    """
    recipes = {config.recipe(hyper) for hyper in request.groups}
    unshared = state.arrays.unshared if isinstance(state.arrays, FairState) else state.arrays
    if not _is_plain(request) or len(recipes) > 1 or not suits(recipe := recipes.pop()):
        return None
    held = unshared.lane_arrays(recipe) if isinstance(unshared, CpuState) else None
    if held is None or not suits(held[0]) or state.unfinished is not None or state.capture is not None:
        return None
    segments, updated = state.tensor_steps.segments(config.active), state.tensor_steps.group_steps()
    if not _are_plain(config, request, segments, updated):
        return None
    groups, rows = [], []
    for ahead in range(min(most, _same_width(request.step, *(t + 1 for t in updated)))):
        try:
            groups.append(effective_groups(config, request, [t + ahead for t in updated]))
        except StepwireError:  # a learning rate out of range, which its own step is refused for
            break
        counted = [segment._replace(t=segment.t + ahead) for segment in segments]
        stepped = passes(config, groups[-1], counted, state.unscale(request), (1.0,) * len(groups[-1]))
        rows.append([lane_numbers(each.step, held[0]) for each in stepped])
    if not rows:
        return None
    summed = config.active.segments if config.squares else ()
    return LaneBatch(
        request,
        held[0],
        held[1],
        groups,
        [t + 1 for t in updated],
        state.unscale(request),
        np.array([(each.start, each.end - each.start) for each in segments], np.int64),
        np.array(rows, np.float64).reshape(len(rows), len(segments), lane_scalars(held[0])),
        np.array([(start, end - start, group) for start, end, group in summed], np.int64).reshape(-1, 3),
    )


def _is_plain(request: StepRequest) -> bool:
    ordered = request.reply_first or request.reply_base is not None or request.overlap or request.awaits_admission
    return not (ordered or request.missing or request.tables) and request.gradient_dtype != INT8


def _are_plain(
    config: SessionConfig, request: StepRequest, segments: Sequence[CountedSegment], updated: Sequence[int]
) -> bool:
    """Tell whether one pass a segment makes the step, and every group counts it."""
    size, moved = config.layout.size, [0] * len(updated)
    for segment in segments:
        moved[segment.group] = max(moved[segment.group], segment.t)
    counts = moved == [t + 1 for t in updated]
    stepped = sum(each.end - each.start for each in segments)
    all_stepped = stepped == sum(each.count for each in config.layout.tensors)  # padding is none of them
    whole = not request.reply or (request.reply_elements >= size and all_stepped)
    ranges = len(config.active.segments) + -(-size // GRAIN)
    return counts and whole and ranges <= _MOST_SUMMED and (len(segments) <= _MOST_MEASURED or not config.measures)


def _same_width(*numbers: int) -> int:
    """Return the steps until one of these numbers has more digits of 7 bits."""
    return min((1 << 7 * max(-(-number.bit_length() // 7), 1)) - number for number in numbers)
