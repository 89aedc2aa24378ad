"""The door of a session for several workers, by its config."""

from __future__ import annotations

from stepwire_server.aggregation.host import host_engine
from stepwire_server.aggregation.reductions import reduction_bytes, reduction_of
from stepwire_server.sessions.async_steps import AsyncSteps
from stepwire_server.sessions.contributions import Contributions, Parts
from stepwire_server.sessions.rounds import Rounds

__all__ = ["contributions_of"]


def contributions_of(parts: Parts) -> Contributions | None:
    """Return the door of a session for several workers; None where it has one worker.

    Raises:
        ResourceExhaustedError: what a round needs beside the state does not fit.
    """
    config = parts.config
    if (aggregation := config.aggregation) is None:
        return None
    if aggregation.mode == "async":
        return AsyncSteps(parts)
    device, layout = parts.state.device, config.layout
    room = device.budget.reserve(reduction_bytes(aggregation, layout), "the sum of the workers' gradients")
    try:
        engine = host_engine(device.engine)
        (engine.prepare_rows if aggregation.is_robust else engine.prepare_sum)(config.gradient_dtype)
        return Rounds(parts, engine.staging(layout.size), reduction_of(aggregation, engine, layout), room)
    except BaseException:
        room.release()
        raise
