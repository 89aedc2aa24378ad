"""The reduction that a session asks for, and the memory that it takes."""

from __future__ import annotations

from stepwire.layout import Layout
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


def reduction_bytes(aggregation: Aggregation, layout: Layout) -> int:
    """Return the bytes that a reduction takes beside the state and beside the rows of tables."""
    if aggregation.is_robust:
        return robust_bytes(layout.size, aggregation.workers)
    return accumulator_bytes(layout.dense_size, whole_factors=aggregation.reduction != "weighted_mean")


def reduction_of(aggregation: Aggregation, engine: CpuEngine, layout: Layout) -> Reduction:
    """Make a reduction of gradients in a layout.

    Raises:
        ResourceExhaustedError: there is no memory for it.
    """
    if not aggregation.is_robust:
        return Accumulator(engine.exact_sum(layout.dense_size), layout)
    return RobustReduction(engine.gradient_rows(layout.size, aggregation.workers), _combine(aggregation))


def _combine(aggregation: Aggregation) -> Combine:
    if aggregation.reduction == "median":
        return median
    if aggregation.reduction == "trimmed_mean":
        assert aggregation.trimmed is not None
        return trimmed_mean(aggregation.trimmed)
    return norm_bounded_mean(aggregation.norm_bound)
