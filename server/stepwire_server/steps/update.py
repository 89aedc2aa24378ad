"""The numbers of one update: what each range of the space is to be stepped with."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import rounded_norm
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Pass, Pending
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import Decay, Recipe
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.rules.schedules import factor
from stepwire_server.steps.gradient import ChunkRange, GradientStaging
from stepwire_server.steps.tensor_steps import CountedSegment

__all__ = ["SegmentPass", "between", "effective_groups", "gradient_factor", "passes", "recipe_for", "trusted"]


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
    """Return the numbers that a step uses: the order's, with scheduled learning rates.

    Args:
        config: the session's.
        request: the step's.
        updates: the updates each group has had.

    Raises:
        InvalidRequestError: a scheduled learning rate is beyond float64.
    """
    if not config.scheduled:
        return request.groups
    effective = []
    for index, (hyper, schedule) in enumerate(zip(request.groups, config.schedules, strict=True)):
        if schedule is not None and not (request.own_lr and request.own_lr[index]):
            hyper = dataclasses.replace(hyper, lr=hyper.lr * factor(schedule, updates[index]))
            if not math.isfinite(hyper.lr):
                raise InvalidRequestError(
                    f"groups[{index}].schedule: the learning rate after {updates[index]} updates is {hyper.lr}; send a "
                    "learning rate with the step, or create the session with a smaller one",
                    metadata={"field": f"groups[{index}].schedule"},
                )
        effective.append(hyper)
    return tuple(effective)


def gradient_factor(hyper: Hyperparameters, unscale: float) -> float:
    """Return what a group's gradient is multiplied by first."""
    return -unscale if hyper.maximize else unscale


def recipe_for(config: SessionConfig, hyper: Hyperparameters) -> Recipe:
    """Return the arithmetic of a group's update."""
    return config.recipes[1 if hyper.weight_decay else 0]


def passes(
    config: SessionConfig,
    groups: Sequence[Hyperparameters],
    runs: Sequence[CountedSegment],
    unscale: float,
    clips: Sequence[float],
) -> list[SegmentPass]:
    """Return the arithmetic of each run; that of layerwise rules still lacks its trust ratio."""
    return [
        SegmentPass(run.start, run.end, run.group, _pass(config, groups[run.group], run.t, unscale, clips[run.group]))
        for run in runs
    ]


def _pass(config: SessionConfig, hyper: Hyperparameters, t: int, unscale: float, clip: float) -> Pass:
    recipe, treatment = recipe_for(config, hyper), config.treatment
    scalars = [gradient_factor(hyper, unscale), clip]
    if recipe.limits:
        scalars.append(treatment.clip_grad_value or 0.0)
    if recipe.decay is not Decay.NONE:
        scalars.append(recipe.decay.scalar(hyper))
    if recipe.averages:
        scalars.append(1.0 - (treatment.parameter_average_decay or 0.0))
    return Pass(recipe, (*scalars, *recipe.rule.scalars(hyper, t)), seed=t)


def trusted(
    steps: Sequence[SegmentPass], groups: Sequence[Hyperparameters], staging: GradientStaging, state: EngineState
) -> list[SegmentPass]:
    """Measure each tensor of a layerwise rule, and complete its scalars with the trust ratio; changes nothing."""
    asked = [_ask(run, list(staging.pieces(run.start, run.end)), state) for run in steps]
    return [_with_trust(each, groups[each.run.group], state) for each in asked]


class _Asked(NamedTuple):
    """A run whose pieces are being measured."""

    run: SegmentPass
    pieces: list[ChunkRange]
    probe: Pass
    totals: list[Pending[tuple[float, float]]]


def _ask(run: SegmentPass, pieces: list[ChunkRange], state: EngineState) -> _Asked:
    probe = run.step._replace(scalars=(*run.step.scalars, 1.0))
    totals = [state.measure(probe, piece.start, piece.chunk.gradient, piece.begin, piece.end) for piece in pieces]
    return _Asked(run, pieces, probe, totals)


def _with_trust(asked: _Asked, hyper: Hyperparameters, state: EngineState) -> SegmentPass:
    run, pieces, probe, _ = asked
    totals = [pending.wait() for pending in asked.totals]
    params, directions = (math.fsum(total[index] for total in totals) for index in (0, 1))
    param_norm = rounded_norm(
        params, lambda: exact_sum_of_squares(_read(state, piece.start, piece.end - piece.begin) for piece in pieces)
    )
    direction_norm = rounded_norm(
        directions,
        lambda: exact_sum_of_squares(
            state.fetch_direction(probe, piece.start, piece.chunk.gradient, piece.begin, piece.end) for piece in pieces
        ),
    )
    rule = run.step.recipe.rule
    assert rule.trust is not None
    trust = rule.trust(hyper, param_norm, direction_norm)
    return run._replace(step=run.step._replace(scalars=(*run.step.scalars, trust)))


def _read(state: EngineState, start: int, count: int) -> HostArray:
    values = np.empty(count, np.float32)
    state.read(PARAM, start, values).wait()
    return values


def between(runs: Sequence[SegmentPass], start: int, end: int) -> Sequence[SegmentPass]:
    """Return the runs that share elements with `[start, end)`."""
    first = bisect_right(runs, start, key=_END)
    return runs[first : bisect_left(runs, end, lo=first, key=_START)]
