"""The span of a step, or of a stage of it, in plain numbers: OpenTelemetry's own is made of it later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from stepwire.wire.trace_context import TraceContext

__all__ = ["SPAN", "Attributes", "Kind", "Span"]

Attributes: TypeAlias = Mapping[str, str | int | float | bool]
Kind: TypeAlias = Literal["client", "server", "internal"]

SPAN = "stepwire.step"
"""The name of a step's span; those of its parts begin with it."""


class Span(NamedTuple):
    """The time of a step, or of a part of it.

    Attributes:
        name: the kind of the span, with no name of a session in it.
        context: its place in the trace.
        parent: the context of the span that it is a part of; None for the first of a trace.
        start_ns: its begin, in nanoseconds since 1970.
        end_ns: its end, likewise.
        kind: the side of the call, or "internal" for no call.
        attributes: more about it.
        error: the text of its failure; empty without one.
    """

    name: str
    context: TraceContext
    parent: TraceContext | None
    start_ns: int
    end_ns: int
    kind: Kind = "internal"
    attributes: Attributes = {}
    error: str = ""
