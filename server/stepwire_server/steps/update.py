"""One update: the arithmetic of each segment, and its way through the state, range by range."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import rounded_norm
from stepwire_server.engines.protocol import PARAM, EngineState, Gradient, HostArray, Pass, Pending
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Decay, Recipe
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.rules.schedules import factor
from stepwire_server.steps.gradient import ChunkRange, StagedGradient
from stepwire_server.steps.tensor_steps import CountedSegment

__all__ = ["SegmentPass", "Update", "effective_groups", "gradient_factor", "passes", "treatment_scalars", "trusted"]


_START: Final = itemgetter(0)
_END: Final = itemgetter(1)


class SegmentPass(NamedTuple):
    """Flat elements `[start, end)` of one group with the arithmetic of one update."""

    start: int
    end: int
    group: int
    step: Pass


def effective_groups(
    config: SessionConfig, request: StepRequest, updates: Sequence[int]
) -> tuple[Hyperparameters, ...]:
    """Return the numbers that a step uses: the request's, with scheduled learning rates.

    Args:
        config: the session's config.
        request: the step's request.
        updates: the updates that each group has had.

    Raises:
        InvalidRequestError: a scheduled learning rate is beyond float32, itself or as a step size.
    """
    groups = _scheduled(config, request, updates) if config.scheduled else request.groups
    if request.lr_factor == 1.0:
        return groups
    return tuple(dataclasses.replace(hyper, lr=hyper.lr * request.lr_factor) for hyper in groups)


def _scheduled(config: SessionConfig, request: StepRequest, updates: Sequence[int]) -> tuple[Hyperparameters, ...]:
    effective = []
    for index, (hyper, schedule) in enumerate(zip(request.groups, config.schedules, strict=True)):
        if schedule is not None and not (request.own_lr and request.own_lr[index]):
            hyper = dataclasses.replace(hyper, lr=hyper.lr * factor(schedule, updates[index]))
            if not hyper.lr <= (largest := config.optimizer.largest_lr(hyper)):
                raise InvalidRequestError(
                    f"groups[{index}].schedule: the learning rate after {updates[index]} updates is {hyper.lr:.6g}, "
                    f"and float32 has step sizes up to {largest:.3g} alone; send a learning rate with the step, or "
                    "create the session with a smaller one",
                    metadata={"field": f"groups[{index}].schedule"},
                )
        effective.append(hyper)
    return tuple(effective)


def gradient_factor(hyper: Hyperparameters, unscale: float) -> float:
    """Return what a group's gradient is multiplied by first."""
    return -unscale if hyper.maximize else unscale


def passes(
    config: SessionConfig,
    groups: Sequence[Hyperparameters],
    segments: Sequence[CountedSegment],
    unscale: float,
    clips: Sequence[float],
) -> list[SegmentPass]:
    """Return the arithmetic of each segment; that of layerwise rules still lacks its trust ratio."""
    return [
        SegmentPass(
            each.start, each.end, each.group, _pass(config, groups[each.group], each, unscale, clips[each.group])
        )
        for each in segments
    ]


def treatment_scalars(config: SessionConfig, hyper: Hyperparameters, unscale: float, clip: float) -> list[float]:
    """Return the scalars of a group's recipe that come before those of its rule."""
    return _treated(config.recipe(hyper), config, hyper, unscale, clip)


def _treated(recipe: Recipe, config: SessionConfig, hyper: Hyperparameters, unscale: float, clip: float) -> list[float]:
    treatment = config.treatment
    scalars = [gradient_factor(hyper, unscale), clip]
    if recipe.limits:
        scalars.append(treatment.clip_grad_value or 0.0)
    if recipe.decay is not Decay.NONE:
        scalars.append(recipe.decay.scalar(hyper))
    if recipe.averages:
        scalars.append(1.0 - (treatment.parameter_average_decay or 0.0))
    return scalars


def _pass(config: SessionConfig, hyper: Hyperparameters, segment: CountedSegment, unscale: float, clip: float) -> Pass:
    recipe = config.recipe(hyper)
    scalars = _treated(recipe, config, hyper, unscale, clip)
    kept = () if recipe.rule.tensor_scalar is None else (segment.scalar,)
    return Pass(recipe, (*scalars, *recipe.rule.scalars(hyper, segment.t, *kept)), seed=segment.t)


def trusted(
    segments: Sequence[SegmentPass], groups: Sequence[Hyperparameters], gradient: StagedGradient, arrays: EngineState
) -> list[SegmentPass]:
    """Measure each tensor of a layerwise rule, and complete its scalars with the trust ratio; changes nothing."""
    asked = [_ask(segment, list(gradient.ranges(segment.start, segment.end)), arrays) for segment in segments]
    return [_with_trust(each, groups[each.segment.group], arrays) for each in asked]


class _Asked(NamedTuple):
    """A segment whose ranges are being measured."""

    segment: SegmentPass
    ranges: list[ChunkRange]
    probe: Pass
    totals: list[Pending[tuple[float, float]]]


def _ask(segment: SegmentPass, ranges: list[ChunkRange], arrays: EngineState) -> _Asked:
    probe = segment.step._replace(scalars=(*segment.step.scalars, 1.0))
    totals = [arrays.measure(probe, found.start, found.chunk.gradient, found.begin, found.end) for found in ranges]
    return _Asked(segment, ranges, probe, totals)


def _with_trust(asked: _Asked, hyper: Hyperparameters, arrays: EngineState) -> SegmentPass:
    segment, ranges, probe, _ = asked
    totals = [pending.wait() for pending in asked.totals]
    params, directions = (math.fsum(total[index] for total in totals) for index in (0, 1))
    param_norm = rounded_norm(
        params, lambda: exact_sum_of_squares(_read(arrays, found.start, found.end - found.begin) for found in ranges)
    )
    direction_norm = rounded_norm(
        directions,
        lambda: exact_sum_of_squares(
            arrays.fetch_direction(probe, found.start, found.chunk.gradient, found.begin, found.end) for found in ranges
        ),
    )
    rule = segment.step.recipe.rule
    assert rule.trust is not None
    scalars = (*segment.step.scalars[:-1], *rule.trust(hyper, param_norm, direction_norm))
    return segment._replace(step=segment.step._replace(scalars=scalars))


def _read(arrays: EngineState, start: int, count: int) -> HostArray:
    values = np.empty(count, np.float32)
    arrays.read(PARAM, start, values).wait()
    return values


def _between(segments: Sequence[SegmentPass], start: int, end: int) -> Sequence[SegmentPass]:
    """Return the segments that share elements with `[start, end)`."""
    first = bisect_right(segments, start, key=_END)
    return segments[first : bisect_left(segments, end, lo=first, key=_START)]


class Update:
    """One update on its way through the state, and the sums that its passes return."""

    def __init__(self, arrays: EngineState, segments: Sequence[SegmentPass], group_count: int) -> None:
        """Step `segments` of the state; elements of no segment stay as they are."""
        self._arrays = arrays
        self._segments = segments
        self._sums: list[list[Pending[tuple[float, ...]]]] = [[] for _ in range(group_count)]

    def apply(
        self, gradient: Gradient | None, offset: int, start: int, end: int, out: HostArray | None
    ) -> list[Pending[Any]]:
        """Update flat elements `[start, end)`, and encode them into `out`.

        Args:
            gradient: a chunk; None where nothing was sent: then the range goes back as it is.
            offset: the chunk's first flat element.
            start: first flat element.
            end: one past the last.
            out: `(end - start,)`; None for no reply.

        Returns:
            The work that `out` waits for.
        """
        if gradient is None:
            return self.read(start, end, start, out)
        done = start
        work: list[Pending[Any]] = []
        for first, last, group, step in _between(self._segments, start, end):
            low, high = max(first, start), min(last, end)
            if done < low:
                work += self.read(done, low, start, out)
            target = None if out is None else out[low - start : high - start]
            moved = self._arrays.update(step, low, gradient, low - offset, high - offset, target)
            self._sums[group].append(moved)
            work.append(moved)
            done = high
        if done < end:
            work += self.read(done, end, start, out)
        return work

    def read(self, low: int, high: int, start: int, out: HostArray | None) -> list[Pending[Any]]:
        """Encode flat elements `[low, high)` as they are into `out`, which begins at `start`."""
        if out is None or low == high:
            return []
        return [self._arrays.read(PARAM, low, out[low - start : high - start])]

    def add(self, group: int, sums: Sequence[Pending[tuple[float, ...]]]) -> None:
        """Note the sums of other passes over a group."""
        self._sums[group] += sums

    def norms(self) -> list[list[float]]:
        """Return for each group the roots of its passes' sums, in the order of `Recipe.sums`; [] for none."""
        moved = [[asked.wait() for asked in group] for group in self._sums]
        return [[math.sqrt(math.fsum(column)) for column in zip(*group, strict=True)] for group in moved]
