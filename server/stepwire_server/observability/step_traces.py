"""Traces of the server's steps: spans of the stage times that each step has anyway, made after its reply has left."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Final

from stepwire.tracing.export import SpanExport, export_of_environment
from stepwire.tracing.sampling import StepSampling
from stepwire.tracing.spans import SPAN, Attributes, Span
from stepwire.wire.trace_context import TraceContext
from stepwire_server.observability.digests import digest_in_logs
from stepwire_server.records.replied import Replied

__all__ = ["ReplyTraces"]

_SERVER_SPAN: Final = f"{SPAN}.server"
_SESSIONS: Final = 1024
_NANOSECONDS: Final = 1e9


class ReplyTraces:
    """The traces of all sessions' steps. Thread-safe; closes twice without complaint.

    A step whose client traces it is traced. A step without a client's trace is, if it is one in N of its session, or
    slow. A step that is slow for the server alone is in the client's trace too, as a span without its parent.
    """

    def __init__(self, export: SpanExport, one_in: int) -> None:
        """Export the spans of one step in `one_in`, and of slow ones; the export is closed with this."""
        self._export = export
        self._sampling = functools.lru_cache(maxsize=_SESSIONS)(lambda session_id: StepSampling(one_in))

    @classmethod
    def of_environment(cls, one_in: int) -> ReplyTraces | None:
        """Return the traces of a server; None if it wants none, or the environment.

        Raises:
            InvalidRequestError: the exporter refuses its variables.
            UnsupportedFeatureError: OpenTelemetry is not installed.
        """
        export = export_of_environment("stepwire-server", "trace_one_in") if one_in else None
        return None if export is None else cls(export, one_in)

    def replied(self, replied: Replied) -> None:
        """Export the spans of a step that was replied to just now, if it is to be traced; a `RepliedSink`."""
        sampling, parent = self._sampling(replied.session_id), replied.trace
        slow = sampling.is_slow(replied.seconds)
        if slow or (sampling.is_chosen() if parent is None else parent.sampled):
            self._export.put(functools.partial(_spans, replied, time.time_ns()))

    def close(self) -> None:
        """Export what waits, for some seconds at most."""
        self._export.close()


def _spans(replied: Replied, end_ns: int) -> Iterator[Span]:
    """Yield the span of a step that ended at a time, and those of its stages."""
    context = TraceContext.new(replied.trace, sampled=True)
    start_ns = end_ns - round(replied.seconds * _NANOSECONDS)
    yield Span(_SERVER_SPAN, context, replied.trace, start_ns, end_ns, "server", _attributes(replied))
    for stage, first, last in _stages(replied):
        place = TraceContext.new(context, sampled=True)
        begin_ns = max(start_ns, start_ns + round(first * _NANOSECONDS))
        yield Span(f"{SPAN}.{stage}", place, context, begin_ns, max(begin_ns, start_ns + round(last * _NANOSECONDS)))


def _stages(replied: Replied) -> Iterator[tuple[str, float, float]]:
    """Yield each stage with its begin and its end, in seconds since the begin of the step.

    Stages follow one another, but for the sending, which ends with the step: large replies leave while they are
    computed. The stages of a round are those of all its gradients, so they are laid before its end. A replay and a
    gradient that came too late have none of their own.
    """
    result, times = replied.result, replied.result.times
    if result.replayed or (result.round is not None and result.round.dropped):
        return
    stages = {
        "receive": times.receive,
        "queue": times.queue,
        "reduce": times.reduce,
        "apply": times.apply,
        "sync": replied.sync_seconds,
    }
    sending = replied.seconds - replied.send_seconds
    first = 0.0 if result.round is None else sending - sum(stages.values())
    for name, seconds in stages.items():
        if seconds or name in ("receive", "queue", "apply"):
            yield name, first, first + seconds
        first += seconds
    yield "send", sending, replied.seconds


def _attributes(replied: Replied) -> Attributes:
    result = replied.result
    attributes: dict[str, str | int | float | bool] = {
        "stepwire.step": result.step,
        "stepwire.session": digest_in_logs(replied.session_id),
        "stepwire.transport": replied.transport,
        "stepwire.received_bytes": replied.received_bytes,
        "stepwire.sent_bytes": replied.sent_bytes,
    }
    for name in ("replayed", "skipped", "accumulated"):
        if getattr(result, name):
            attributes[f"stepwire.{name}"] = True
    return attributes
