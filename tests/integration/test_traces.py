"""Traces of real steps: one trace of client, server and shards, with the times that the step has anyway."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.support.numpy_server import numpy_server

_REASON = "opentelemetry-sdk is not installed: pip install 'stepwire[otel]'"
trace = pytest.importorskip("opentelemetry.trace", reason=_REASON)
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=_REASON)
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=_REASON)

Spans = dict[str, list[Any]]
PARAMETERS = {"w": np.zeros((2, 70_000), np.float32)}
GRADIENT = {"w": np.ones((2, 70_000), np.float32)}
ADAM = {"optimizer": stepwire.Adam(lr=0.1), "clip_grad_norm": 1.0}
STAGES = ("receive", "queue", "apply", "send")
NANOSECOND = 1e-9

_EXPORTER = """
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

class Kept(InMemorySpanExporter):
    def shutdown(self):
        pass  # several exporters of one process come here, and end one after another

kept = Kept()

def exporter():
    return kept
"""


@pytest.fixture
def exporter(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The exporter of client and servers, installed and chosen as any exporter is."""
    installed = tmp_path / "kept_spans-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-spans\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[opentelemetry_traces_exporter]\nkept = kept_spans:exporter\n")
    (tmp_path / "kept_spans.py").write_text(_EXPORTER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "kept")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    import kept_spans  # type: ignore[import-not-found]

    yield kept_spans.kept
    del sys.modules["kept_spans"]


def spans_of(exporter: Any) -> Spans:
    found: Spans = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def is_within(inner: Any, outer: Any) -> bool:
    return bool(outer.start_time <= inner.start_time <= inner.end_time <= outer.end_time)


def seconds_of(span: Any) -> float:
    return float((span.end_time - span.start_time) * NANOSECOND)


def test_a_sharded_step_is_one_trace_of_client_shards_and_servers(exporter: Any) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(numpy_server(trace_one_in=1000)) for _ in range(2)]
        targets = [server.target for server in servers]
        client = stack.enter_context(stepwire.connect(targets, transport="tcp", trace_one_in=2))
        session = client.create_session(PARAMETERS, **ADAM)
        session.step(GRADIENT)
        results = [shard.last_result for shard in session.shards]
        session.step(GRADIENT)  # the second of two, so no client and no server traces it
    found = spans_of(exporter)
    counts = {"": 1, ".shard": 2, ".server": 2, **{f".{stage}": 2 for stage in STAGES}}
    assert {name: len(spans) for name, spans in found.items()} == {f"stepwire.step{n}": c for n, c in counts.items()}
    (whole,), shards, served = found["stepwire.step"], found["stepwire.step.shard"], found["stepwire.step.server"]
    assert whole.parent is None
    assert len({span.context.trace_id for spans in found.values() for span in spans}) == 1
    assert len({span.context.span_id for spans in found.values() for span in spans}) == sum(counts.values())
    assert dict(whole.attributes) == {"stepwire.step": 1, "stepwire.target": ",".join(targets)}
    assert {span.resource.attributes["service.name"] for span in (whole, *shards)} == {"stepwire-client"}
    assert {span.resource.attributes["service.name"] for span in served} == {"stepwire-server"}
    assert whole.resource.attributes["deployment.environment"] == "test"
    assert all(result is not None for result in results)
    assert sorted(span.attributes["stepwire.target"] for span in shards) == sorted(targets)
    for shard in shards:
        assert shard.parent.span_id == whole.context.span_id and is_within(shard, whole)
        (server,) = [span for span in served if span.parent.span_id == shard.context.span_id]
        assert (server.parent.is_remote, server.kind) == (True, trace.SpanKind.SERVER)
        result = results[targets.index(shard.attributes["stepwire.target"])]
        _check_stages(found, shard, server, result)
    assert not any(session.session_id.split(",")[0] in span.to_json() for spans in found.values() for span in spans)


def _check_stages(found: Spans, shard: Any, server: Any, result: Any) -> None:
    """Compare the stages of a server's span with the times that the client was told."""
    stages = {
        stage: span
        for stage in STAGES
        for span in found[f"stepwire.step.{stage}"]
        if span.parent.span_id == server.context.span_id
    }
    assert list(stages) == list(STAGES)
    assert all(is_within(span, server) for span in stages.values())
    assert (stages["receive"].start_time, stages["send"].end_time) == (server.start_time, server.end_time)
    assert shard.start_time <= server.start_time and stages["apply"].end_time <= shard.end_time
    for before, after in (("receive", "queue"), ("queue", "apply")):
        assert stages[after].start_time == pytest.approx(stages[before].end_time, abs=2)
        assert seconds_of(stages[before]) == pytest.approx(getattr(result, f"{before}_seconds"), abs=3 * NANOSECOND)
    assert seconds_of(stages["apply"]) == pytest.approx(result.apply_seconds, abs=3 * NANOSECOND)


def test_a_step_within_a_span_of_the_program_is_a_part_of_it_and_a_failure_is_told(exporter: Any) -> None:
    program = sdk.TracerProvider()
    with numpy_server() as server, stepwire.connect(server.target, transport="tcp", trace_one_in=1) as client:
        with client.create_session(PARAMETERS, **ADAM) as session:
            with program.get_tracer("program").start_as_current_span("epoch") as epoch:
                session.step(GRADIENT)
            with pytest.raises(stepwire.NonFiniteGradientError):
                session.step({"w": np.full((2, 70_000), np.nan, np.float32)})
    good, bad = spans_of(exporter)["stepwire.step"]
    assert (good.parent.span_id, good.context.trace_id) == (epoch.context.span_id, epoch.context.trace_id)
    assert good.kind == trace.SpanKind.CLIENT and good.status.is_ok
    assert bad.status.description == "NonFiniteGradientError NON_FINITE_GRADIENT" and not bad.status.is_ok


def test_a_server_traces_steps_of_clients_that_trace_nothing(exporter: Any) -> None:
    with numpy_server(trace_one_in=2) as server, stepwire.connect(server.target) as client:
        with client.create_session(PARAMETERS, **ADAM) as session:
            for _ in range(4):
                session.step(GRADIENT)
            transport = session.transport
    found = spans_of(exporter)["stepwire.step.server"]
    assert transport is not None
    assert [span.parent for span in found] == [None, None]
    assert [span.attributes["stepwire.step"] for span in found] == [1, 3]
    assert {span.attributes["stepwire.transport"] for span in found} == {transport.name}


@pytest.mark.parametrize("variables", [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
def test_the_environment_turns_traces_off(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with numpy_server(trace_one_in=1) as server, stepwire.connect(server.target, trace_one_in=1) as client:
        assert server.monitoring.reply_sinks == []
        with client.create_session(PARAMETERS) as session:
            session.step(GRADIENT)


def test_an_exporter_that_is_not_there_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    with pytest.raises(stepwire.UnsupportedFeatureError, match=r"'carrier-pigeon' is .*pip install 'stepwire\[otel\]'"):
        stepwire.connect("localhost:1", trace_one_in=1)
