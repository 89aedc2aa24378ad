"""The way of spans to an exporter: bounded, whatever the exporter does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire.tracing import export
from stepwire.tracing.spans import Span
from stepwire.wire.trace_context import TraceContext

_REASON = "opentelemetry-sdk is not installed: pip install 'stepwire[otel]'"
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=_REASON)

ROOT = TraceContext(1, 2, True)


@pytest.fixture
def exporter() -> Any:
    return memory.InMemorySpanExporter()


def spans(name: str) -> Iterator[Span]:
    yield Span(name, ROOT, None, 1, 3, attributes={"stepwire.step": 7})


def test_spans_are_made_by_a_thread_of_its_own_and_whole_at_the_end(exporter: Any) -> None:
    threads: list[str] = []

    def made() -> Iterator[Span]:
        threads.append(threading.current_thread().name)
        yield from spans("stepwire.step")

    exports = export.SpanExport(exporter, "me", "trace_one_in")
    exports.put(made)
    exports.close()
    exports.close()
    (span,) = exporter.get_finished_spans()
    assert threads == ["stepwire-traces"]
    assert (span.name, span.start_time, span.end_time, dict(span.attributes)) == (
        "stepwire.step",
        1,
        3,
        {"stepwire.step": 7},
    )
    assert (span.context.trace_id, span.context.span_id, span.parent) == (1, 2, None)
    assert (span.resource.attributes["service.name"], span.instrumentation_scope.name) == ("me", "stepwire")


def test_steps_beyond_a_rate_are_dropped(exporter: Any) -> None:
    now = [5.0]
    exports = export.SpanExport(exporter, "me", "trace_one_in", lambda: now[0])
    for second in (5.0, 6.5):
        now[0] = second
        for _ in range(300):
            exports.put(lambda second=second: spans(f"at {second}"))
    exports.close()
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == ["at 5.0"] * 200 + ["at 6.5"] * 200


def test_spans_that_cannot_be_made_are_told_and_the_next_ones_exported(
    exporter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exports = export.SpanExport(exporter, "me", "trace_one_in")
    with caplog.at_level(logging.ERROR, "stepwire"):
        exports.put(lambda: iter(1 // 0))  # type: ignore[call-overload]
        exports.put(lambda: spans("good"))
        exports.close()
    assert [record.getMessage() for record in caplog.records] == ["the spans of a step were lost"]
    assert [span.name for span in exporter.get_finished_spans()] == ["good"]
