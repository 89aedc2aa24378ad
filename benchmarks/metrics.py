"""The cost of being seen: of a scrape with many sessions, and of counts, history and traces in a small step."""

from __future__ import annotations

import contextlib
import socket
import statistics
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

import stepwire
from stepwire.links.observed import ObservedSteps
from stepwire.steps.trace import StepTraces as ClientTraces
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.trace_context import TraceContext
from stepwire_server.observability.step_traces import ReplyTraces
from stepwire_server.observability.tallies import Tallies
from stepwire_server.processes.spawn import server_process
from stepwire_server.records.committed import Committed
from stepwire_server.records.replied import Replied
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from timing import times_of

__all__ = ["metrics"]

Figures = dict[str, Any]
_SIZE: Final = 1000
_RESULT: Final = step_pb2.StepResult(step=1)
_REPLIED: Final = Replied(
    "tcp",
    StepResult(1, 1, False, 1.0, 0, (), StepTimes(1e-4, 2e-5, 3e-5)),
    FLOAT32,
    FLOAT32,
    received_bytes=4000,
    sent_bytes=4200,
    sync_seconds=0.0,
    send_seconds=1e-5,
    seconds=3e-4,
    session_id="0" * 32,
)
_GRADIENT: Final = {"w": np.full(_SIZE, 0.01, np.float32)}


def metrics(*, sessions: int = 256, scrapes: int = 100, rounds: int = 40, batch: int = 100) -> Figures:
    """Scrape a server of many attached sessions, and step a small one with metrics and without, in turns.

    Args:
        sessions: the sessions of the scraped server, each with a stream of its own.
        scrapes: the scrapes.
        rounds: the turns of steps.
        batch: the steps of a turn.
    """
    with _measured_server() as (target, url):
        scraped = _scrapes(target, url, sessions, scrapes)
        with server_process("--device", "cpu") as plain:
            off, on = _steps((plain.target, target), rounds, batch)
    counting = _counting()
    return {
        "sessions": sessions,
        "scrape p50 ms": float(np.percentile(scraped, 50)) * 1e3,
        "scrape p99 ms": float(np.percentile(scraped, 99)) * 1e3,
        "step without metrics p50 us": statistics.median(off) * 1e6,
        "step with metrics p50 us": statistics.median(on) * 1e6,
        "with metrics to without": statistics.median(b / a for a, b in zip(off, on, strict=True)),
        "counting of a step us": counting * 1e6,
        "counting to a step": counting / statistics.median(off),
        "history of a step us": _remembering() * 1e6,
        "step beside traced ones us": _choosing() * 1e6,
    }


@contextlib.contextmanager
def _measured_server() -> Iterator[tuple[str, str]]:
    """Run a server with metrics; yields its target and the address of the metrics."""
    with socket.socket() as probe:  # a process tells no port but that of its steps
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with server_process("--device", "cpu", "--metrics", f"127.0.0.1:{port}") as server:
        yield server.target, f"http://127.0.0.1:{port}/metrics"


def _scrapes(target: str, url: str, sessions: int, scrapes: int) -> list[float]:
    def scrape() -> None:
        with urllib.request.urlopen(url) as response:
            response.read()

    with stepwire.connect(target, transport="tcp") as client, contextlib.ExitStack() as stack:
        for _ in range(sessions):
            stack.enter_context(client.create_session(_GRADIENT)).step(_GRADIENT)
        return times_of(scrape, scrapes)


def _steps(targets: tuple[str, str], rounds: int, batch: int) -> tuple[list[float], list[float]]:
    """Step a session of each server in turns; return the medians of the turns."""
    out = {"w": np.empty(_SIZE, np.float32)}
    medians: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(stepwire.connect(target, transport="tcp")) for target in targets]
        sessions = [stack.enter_context(client.create_session(_GRADIENT)) for client in clients]
        for turn in range(-3, rounds):
            for found, session in zip(medians, sessions, strict=True):
                times = times_of(lambda session=session: session.step(_GRADIENT, out=out), batch)
                if turn >= 0:
                    found.append(statistics.median(times))
    return medians


def _counting(rounds: int = 50, batch: int = 1000) -> float:
    """Return the seconds of all that is counted in a step."""
    tallies = Tallies()
    request = StepRequest(1, 1, FLOAT32, FLOAT32, True, _SIZE, ())

    def count() -> None:
        tallies.committed(Committed("0" * 32, 0, 1, request, _REPLIED.result, "tcp"))
        tallies.replied(_REPLIED)

    return min(sum(times_of(count, batch)) / batch for _ in range(rounds))


class _NoServer:
    """A link whose steps cost nothing."""

    def step(self, call: Any, deadline: Any) -> step_pb2.StepResult:
        return _RESULT


def _remembering(rounds: int = 50, batch: int = 1000) -> float:
    """Return the seconds that the history costs a step on the client."""
    observed = ObservedSteps(_NoServer())  # type: ignore[arg-type]

    def remember() -> None:
        observed.step(None, None)  # type: ignore[arg-type]

    return min(sum(times_of(remember, batch)) / batch for _ in range(rounds))


class _NoExport:
    """An export that nothing reaches."""

    def current(self) -> None:
        return None

    def put(self, spans: Any) -> None:  # of a step that was slow by chance
        pass


def _choosing(rounds: int = 50, batch: int = 1000) -> float:
    """Return the seconds that traces cost a step that is not traced, on client and server together."""
    export: Any = _NoExport()
    client, server, begin = ClientTraces(export, 1 << 50, "here"), ReplyTraces(export, 1 << 50), step_pb2.StepBegin()
    client.begin(begin)  # the first one is chosen

    def choose() -> None:
        client.end(client.begin(begin), 1, None)
        server.replied(_REPLIED._replace(trace=TraceContext.parse(begin.traceparent, "traceparent")))

    return min(sum(times_of(choose, batch)) / batch for _ in range(rounds))
