"""The way of spans to OpenTelemetry's exporter, which the standard variables OTEL_… choose. Loads it when it is made.

OpenTelemetry gives a span its number when it begins, which costs a hundred times what a step may pay. Here a step has
its numbers already, so a thread of its own makes OpenTelemetry's records of them, and hands those to its processor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.tracing.spans import Span
from stepwire.version import __version__
from stepwire.wire.trace_context import TraceContext

__all__ = ["SpanExport", "export_of_environment"]

_log = logging.getLogger("stepwire")

Spans: TypeAlias = Callable[[], Iterable[Span]]
"""Makes the spans of a step, in the exporting thread."""

_GROUP: Final = "opentelemetry_traces_exporter"
_MOST_WAITING: Final = 1024
_STEPS_A_SECOND: Final = 200
_CLOSE_SECONDS: Final = 5.0
_PACKAGES: Final = (
    "pip install 'stepwire[otel]' brings OpenTelemetry and its exporter over gRPC; others are packages of their own, "
    "such as opentelemetry-exporter-otlp-proto-http"
)


def export_of_environment(service: str, field: str) -> SpanExport | None:
    """Return the way to the exporter that the environment names; None if it wants none.

    OTEL_TRACES_EXPORTER is `otlp`, the default, `console`, `none`, or the name that an installed exporter has in the
    group of entry points. OTEL_EXPORTER_OTLP_… configure `otlp`, and OTEL_SDK_DISABLED turns everything off.

    Args:
        service: the name of the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES have one.
        field: the option that asks for traces, for errors.

    Raises:
        UnsupportedFeatureError: OpenTelemetry, or the exporter, is not installed.
        InvalidRequestError: the exporter refuses its variables.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER", "") or "otlp"
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or name == "none":
        return None
    return SpanExport(_exporter(name, field), service, field)


def _exporter(name: str, field: str) -> Any:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    asked = {None: "otlp_proto_grpc", "grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
    entry = asked.get(protocol, protocol) if name == "otlp" else name
    metadata = importlib.import_module("importlib.metadata")  # which a client without traces never loads
    found = [each for each in metadata.entry_points(group=_GROUP) if each.name == entry]
    if not found:
        raise _missing(field, f"no exporter of traces {entry!r} is installed")
    try:
        return found[0].load()()
    except ImportError as missing:
        raise _missing(field, f"the exporter of traces {entry!r} cannot be loaded ({missing})") from missing
    except Exception as problem:
        raise InvalidRequestError.of(
            field, f"the exporter of traces {entry!r} refuses its OTEL_… variables: {problem}; mend them"
        ) from problem


class SpanExport:
    """Exports spans from a thread of its own. Thread-safe; closes twice without complaint, and with its last user."""

    def __init__(self, exporter: Any, service: str, field: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Export by one of OpenTelemetry's `SpanExporter`s, which is closed with this.

        Args:
            exporter: the exporter.
            service: the name of the service, unless the environment has one.
            field: the option that asks for traces, for errors.
            clock: returns seconds; tests pass their own.

        Raises:
            UnsupportedFeatureError: OpenTelemetry is not installed.
        """
        self._clock = clock
        try:
            self._api = importlib.import_module("opentelemetry.trace")
            records = _Records(self._api, service)
            batches = importlib.import_module("opentelemetry.sdk.trace.export")
        except ImportError as missing:
            raise _missing(field, "traces need opentelemetry-sdk") from missing
        self._second, self._put = 0, 0
        self._waiting: queue.SimpleQueue[Spans | None] = queue.SimpleQueue()
        work = functools.partial(_export, self._waiting, records, batches.BatchSpanProcessor(exporter))
        self._thread = threading.Thread(target=work, name="stepwire-traces", daemon=True)
        self._thread.start()
        self._ending = weakref.finalize(self, _end, self._waiting, self._thread)

    def put(self, spans: Spans) -> None:
        """Export the spans of a step, which the exporting thread makes, unless there are too many steps.

        A client decides whether its steps are traced, and may have all of them traced. That must not cost a server much
        more than the steps do.
        """
        second = int(self._clock())
        if second != self._second:
            self._second, self._put = second, 0
        self._put += 1
        if self._put <= _STEPS_A_SECOND and self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(spans)

    def current(self) -> TraceContext | None:
        """Return the span that this thread's program is in, if OpenTelemetry records it."""
        context = self._api.get_current_span().get_span_context()
        if not (context.is_valid and context.trace_flags.sampled):
            return None
        return TraceContext(context.trace_id, context.span_id, True)

    def close(self) -> None:
        """Export everything that waits, for some seconds at most, and end. The end of the process does so too."""
        self._ending()


def _end(waiting: queue.SimpleQueue[Spans | None], thread: threading.Thread) -> None:
    waiting.put(None)
    if thread is not threading.current_thread():  # whose spans may have been the last user
        thread.join(_CLOSE_SECONDS)


def _export(waiting: queue.SimpleQueue[Spans | None], records: _Records, processor: Any) -> None:
    """Export until there is a None."""
    while (spans := waiting.get()) is not None:
        try:
            for span in spans():
                processor.on_end(records.of(span))
        except Exception:
            _log.exception("the spans of a step were lost")
        del spans
    with contextlib.suppress(Exception):  # exporters have said it in their own words
        processor.shutdown()


class _Records:
    """Makes OpenTelemetry's records of spans."""

    def __init__(self, api: Any, service: str) -> None:
        scopes = importlib.import_module("opentelemetry.sdk.util.instrumentation")
        self._api = api
        self._sdk = importlib.import_module("opentelemetry.sdk.trace")
        self._resource = _resource(service)
        self._scope = scopes.InstrumentationScope("stepwire", __version__)
        self._flags = api.TraceFlags(api.TraceFlags.SAMPLED)

    def of(self, span: Span) -> Any:
        """Return the record of a span."""
        status = self._api.Status(self._api.StatusCode.UNSET)
        if span.error:
            status = self._api.Status(self._api.StatusCode.ERROR, span.error)
        return self._sdk.ReadableSpan(
            name=span.name,
            context=self._context(span.context, remote=False),
            parent=None if span.parent is None else self._context(span.parent, remote=span.kind == "server"),
            resource=self._resource,
            attributes=dict(span.attributes),
            kind=getattr(self._api.SpanKind, span.kind.upper()),
            status=status,
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )

    def _context(self, context: TraceContext, *, remote: bool) -> Any:
        return self._api.SpanContext(context.trace_id, context.span_id, remote, self._flags)


def _resource(service: str) -> Any:
    resources = importlib.import_module("opentelemetry.sdk.resources")
    resource = resources.Resource.create({"service.version": __version__})
    if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(resources.Resource({"service.name": service}))
    return resource


def _missing(field: str, problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"{field}: {problem}; {_PACKAGES}", metadata={"field": field, "feature": "tracing"})
