"""A session at one moment, for whoever watches a server."""

from __future__ import annotations

from typing import NamedTuple

from stepwire_server.records.step_result import StepResult

__all__ = ["SessionSnapshot"]


class SessionSnapshot(NamedTuple):
    """One session in memory.

    Attributes:
        session_id: its id.
        label: the text that its client gave it: any characters.
        tenant: the tenant that it belongs to; empty for the only one.
        device: the device that the state resides on.
        state: "attached", "idle", "empty" (no parameters so far) or "damaged".
        transports: the ways that the attached workers step, each once, sorted.
        applied_step: the last committed step.
        durable_step: the last step that survives a loss of the server; None for a session in memory alone.
        memory_bytes: the bytes reserved for the state.
        attached_workers: the workers that have a stream.
        workers: the most workers that it may have.
        idle_seconds: the time since its last use; 0 in use.
        result: the result of the last step; None before the first.
    """

    session_id: str
    label: str
    tenant: str
    device: str
    state: str
    transports: tuple[str, ...]
    applied_step: int
    durable_step: int | None
    memory_bytes: int
    attached_workers: int
    workers: int
    idle_seconds: float
    result: StepResult | None

    @property
    def durable_lag(self) -> int:
        """The steps that a loss of the server would lose; 0 for a session in memory alone, which promises none."""
        return 0 if self.durable_step is None else max(self.applied_step - self.durable_step, 0)
