"""A session in numbers, for whoever watches a server."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RegistryStatistics", "SessionStatistics"]


class SessionStatistics(NamedTuple):
    """A session at one moment.

    Attributes:
        applied_step: the last committed step.
        applied_load: the last committed load.
        unfinished_step: the step that is half applied; 0 for none.
        memory_bytes: the bytes reserved for the state.
        attached: a stream is attached.
        loads: the loads on their way in.
    """

    applied_step: int
    applied_load: int
    unfinished_step: int
    memory_bytes: int
    attached: bool
    loads: int


class RegistryStatistics(NamedTuple):
    """The present work of the registry.

    Attributes:
        sessions: the sessions in memory.
        streams: the attached streams.
        reserved_bytes: the bytes reserved, of all budgets together.
        budget_bytes: the bytes that may be reserved, likewise.
        parked: the sessions that are on disk alone.
    """

    sessions: int
    streams: int
    reserved_bytes: int
    budget_bytes: int
    parked: int = 0
