"""The trace of a client's steps: numbers while a step is under way, and spans after it, if it is chosen or slow.

The server, or each shard's, gets the place of the client's span with the opening of the step, so that its spans lie
within. It is sent with every step, since nobody knows beforehand which will be slow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from stepwire.errors import StepwireError
from stepwire.tracing.export import SpanExport, export_of_environment
from stepwire.tracing.sampling import StepSampling, check_one_in
from stepwire.tracing.spans import SPAN, Attributes, Span
from stepwire.v1 import step_pb2
from stepwire.wire.trace_context import TraceContext

__all__ = ["StepTrace", "StepTraces", "StepTracing", "tracing_of"]


class StepTrace:
    """The trace of one step, or of a shard's part of it.

    Attributes:
        context: the place of its span in the trace.
        parent: the place of the span that it is a part of; None for none.
        place: the target of the part; empty for a whole step.
        parts: the traces of the parts that shards have.
        began_ns: the time of its begin, in nanoseconds since 1970.
        seconds: its time, once it has ended.
    """

    __slots__ = ("_began", "began_ns", "context", "parent", "parts", "place", "seconds")

    def __init__(
        self, begin: step_pb2.StepBegin, context: TraceContext, parent: TraceContext | None, place: str = ""
    ) -> None:
        """Begin now, and have the step bring its place in the trace."""
        self.context, self.parent, self.place = context, parent, place
        self.parts: list[StepTrace] = []
        self.seconds = 0.0
        begin.traceparent = str(context)
        self.began_ns, self._began = time.time_ns(), time.perf_counter()

    def part(self, begin: step_pb2.StepBegin, place: str) -> StepTrace:
        """Begin the trace of a shard's part; any thread may."""
        part = StepTrace(begin, TraceContext.new(self.context, sampled=self.context.sampled), self.context, place)
        self.parts.append(part)
        return part

    def end(self) -> float:
        """End now, and return the time that it took in seconds."""
        self.seconds = time.perf_counter() - self._began
        return self.seconds


class StepTraces:
    """The traces of one session's steps."""

    def __init__(self, export: SpanExport, one_in: int, target: str) -> None:
        """Export the spans of one step in `one_in`, and of slow ones, with the target of the client."""
        self._export = export
        self._sampling = StepSampling(one_in)
        self._target = target

    def begin(self, begin: step_pb2.StepBegin) -> StepTrace:
        """Begin the trace of a step; its opening is filled in."""
        parent = self._export.current()
        return StepTrace(begin, TraceContext.new(parent, sampled=self._sampling.is_chosen()), parent)

    def end(self, trace: StepTrace, step: int, error: BaseException | None) -> None:
        """End the trace of a step, applied or failed, and export it if it is to be."""
        slow = self._sampling.is_slow(trace.end())
        if trace.context.sampled or slow:
            problem = "" if error is None else _told(error)
            self._export.put(functools.partial(_spans, trace, step, self._target, problem))


class StepTracing:
    """The tracing of a client's sessions. Closes twice without complaint."""

    def __init__(self, export: SpanExport, one_in: int, target: str) -> None:
        """Trace one step in `one_in` of each session; the export is closed with this."""
        self._export, self._one_in, self._target = export, one_in, target

    def of_session(self) -> StepTraces:
        """Return the traces of another session."""
        return StepTraces(self._export, self._one_in, self._target)

    def close(self) -> None:
        """Export what waits, and end."""
        self._export.close()


def tracing_of(one_in: int, target: str) -> StepTracing | None:
    """Return the tracing of a client; None if it wants none, or the environment.

    Raises:
        InvalidRequestError: `one_in` is no number of steps, or the exporter refuses its variables.
        UnsupportedFeatureError: OpenTelemetry is not installed.
    """
    if not check_one_in(one_in, "trace_one_in"):
        return None
    export = export_of_environment("stepwire-client", "trace_one_in")
    return None if export is None else StepTracing(export, one_in, target)


def _told(error: BaseException) -> str:
    """Return the kind of an error and its reason. Its text is left out: it may have names of tensors and values."""
    reason = f" {error.reason}" if isinstance(error, StepwireError) else ""
    return f"{type(error).__name__}{reason}"


def _spans(trace: StepTrace, step: int, target: str, error: str) -> Iterator[Span]:
    """Yield the span of a step, and those of its parts."""
    attributes: Attributes = {"stepwire.step": step, "stepwire.target": target}
    yield Span(
        SPAN,
        trace.context,
        trace.parent,
        trace.began_ns,
        trace.began_ns + round(trace.seconds * 1e9),
        kind="internal" if trace.parts else "client",
        attributes=attributes,
        error=error,
    )
    for part in trace.parts:
        end_ns = part.began_ns + round(part.seconds * 1e9)
        place = {**attributes, "stepwire.target": part.place}
        yield Span(f"{SPAN}.shard", part.context, part.parent, part.began_ns, end_ns, "client", place)
