"""The reduction that a session asks for, and the memory that it takes."""

from __future__ import annotations

from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.aggregation.accumulator import Accumulator, accumulator_bytes
from stepwire_server.aggregation.reduction import Reduction
from stepwire_server.aggregation.robust import (
    Combine,
    RobustReduction,
    median,
    norm_bounded_mean,
    robust_bytes,
    trimmed_mean,
)
from stepwire_server.engines.cpu.engine import CpuEngine

__all__ = ["reduction_bytes", "reduction_of"]


def reduction_bytes(aggregation: Aggregation, size: int) -> int:
    """Return the bytes that a reduction of `size` elements takes beside the state."""
    if aggregation.is_robust:
        return robust_bytes(size, aggregation.workers)
    return accumulator_bytes(size, whole_factors=aggregation.reduction != "weighted_mean")


def reduction_of(aggregation: Aggregation, engine: CpuEngine, size: int) -> Reduction:
    """Make a reduction.

    Raises:
        ResourceExhaustedError: there is no memory for it.
    """
    if not aggregation.is_robust:
        return Accumulator(engine.exact_sum(size))
    return RobustReduction(engine.gradient_rows(size, aggregation.workers), _combine(aggregation))


def _combine(aggregation: Aggregation) -> Combine:
    if aggregation.reduction == "median":
        return median
    if aggregation.reduction == "trimmed_mean":
        assert aggregation.trimmed is not None
        return trimmed_mean(aggregation.trimmed)
    return norm_bounded_mean(aggregation.norm_bound)
