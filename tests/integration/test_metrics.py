"""Metrics of a real server: their values after known steps, their form, and that no session is in them."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_pool, numpy_server

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'stepwire[metrics]'")
parser = pytest.importorskip("prometheus_client.parser")

SIZE = 1000
GRADIENT = {"w": np.full(SIZE, 0.5, np.float32)}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> dict[str, Any]:
    return {"metrics": "127.0.0.1:0", "data_dir": str(tmp_path), "sweep_seconds": 3600.0}


@pytest.fixture
def pool() -> DevicePool:
    """NumPy's kernels, which need no compiler."""
    return numpy_pool()


def text_of(server: Server) -> str:
    assert server.monitoring.metrics is not None
    with urllib.request.urlopen(server.monitoring.metrics.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text: str = response.read().decode()
        return text


def scrape(server: Server) -> Samples:
    families = parser.text_string_to_metric_families(text_of(server))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def client(server: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(server.target, transport="tcp") as client:
        yield client


def test_steps_are_counted_with_their_stages_and_bytes(
    server: Server, client: stepwire.Client, until: Callable[[Callable[[], bool]], None]
) -> None:
    with client.create_session(GRADIENT, non_finite="skip", gradient_dtype="bfloat16", durability="journal") as session:
        for _ in range(3):
            session.step(GRADIENT)
        session.step({"w": np.full(SIZE, np.nan, np.float32)})
        way = {"transport": "tcp"}
        # A reply is counted when gRPC has taken it, which may be after the client has read it.
        until(lambda: scrape(server).get(("stepwire_step_seconds_count", frozenset(way.items()))) == 4)
        samples = scrape(server)
        assert value(samples, "stepwire_sessions", state="attached") == 1
        assert value(samples, "stepwire_workers", state="attached") == 1
        assert value(samples, "stepwire_durable_lag_steps") == 0
    assert value(samples, "stepwire_steps_total", outcome="applied", **way) == 3
    assert value(samples, "stepwire_steps_total", outcome="skipped", **way) == 1
    assert value(samples, "stepwire_received_bytes_total", dtype="bfloat16", **way) == 4 * 2 * SIZE
    assert 4 * 4 * SIZE < value(samples, "stepwire_sent_bytes_total", dtype="float32", **way) < 4 * (4 * SIZE + 500)
    for stage in ("receive", "queue", "apply", "sync", "send"):
        assert value(samples, "stepwire_step_stage_seconds_count", stage=stage) == 4, stage
    assert value(samples, "stepwire_step_stage_seconds_count", stage="reduce") == 0
    assert value(samples, "stepwire_log_sync_seconds_count") >= 4
    assert value(samples, "stepwire_log_written_bytes_total") > 4 * 2 * SIZE
    assert value(samples, "stepwire_memory_reserved_bytes", device="cpu", kind="state") == 4 * 3 * SIZE
    assert value(samples, "stepwire_memory_budget_bytes", device="cpu") == server.registry.pool.limit_bytes


def test_a_round_waits_and_reduces(server: Server, until: Callable[[Callable[[], bool]], None]) -> None:
    with stepwire.connect(server.target, transport="tcp") as first, stepwire.connect(server.target) as second:
        rounds = stepwire.Aggregation(workers=2)
        sessions = [
            client.create_session(GRADIENT, aggregation=rounds, worker=worker, request_id="run")
            for worker, client in enumerate((first, second))
        ]
        pending = [session.step_async(GRADIENT) for session in sessions]
        for step in pending:
            step.result()
        until(lambda: value(scrape(server), "stepwire_round_wait_seconds_count") == 2)
        samples = scrape(server)
        assert value(samples, "stepwire_step_stage_seconds_count", stage="reduce") == 1
        assert sum(count for (name, _), count in samples.items() if name == "stepwire_steps_total") == 1
        for session in sessions:
            session.close()


def test_calls_are_counted_by_status_and_refusals_by_reason(server: Server, client: stepwire.Client) -> None:
    with pytest.raises(stepwire.SessionNotFoundError):
        client.session("0" * 32)
    samples = scrape(server)
    method = {"grpc_type": "unary", "grpc_service": "stepwire.v1.OptimizerService", "grpc_method": "GetSession"}
    assert value(samples, "grpc_server_started_total", **method) == 1
    assert value(samples, "grpc_server_handled_total", grpc_code="NotFound", **method) == 1
    assert value(samples, "grpc_server_handling_seconds_count", **method) == 1
    assert value(samples, "stepwire_refusals_total", reason="SESSION_NOT_FOUND") == 1


def test_no_label_names_a_session(server: Server, client: stepwire.Client) -> None:
    with client.create_session(GRADIENT, label="my run <b>") as session:
        session.step(GRADIENT)
        text = text_of(server)
        assert session.session_id not in text
        assert "my run" not in text


def test_the_metrics_keep_prometheus_conventions(server: Server, client: stepwire.Client) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is missing; it is in Debian's package `prometheus`")
    with client.create_session(GRADIENT, durability="journal") as session:
        session.step(GRADIENT)
        session.save_checkpoint("one")
        text = text_of(server)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "stepwire_checkpoint_seconds_count" in text


def test_replication_is_told_by_both_servers(
    tmp_path: pathlib.Path, until: Callable[[Callable[[], bool]], None]
) -> None:
    where: dict[str, Any] = {"metrics": "127.0.0.1:0", "directory": str(tmp_path), "shard": "a"}
    with numpy_server(**where, standby="required") as primary:
        with numpy_server(**where, standby_of=primary.target) as standby:
            with stepwire.connect(f"directory:{tmp_path}", timeout=120.0) as client:
                session = client.create_session(GRADIENT, durability="replicated")
                for _ in range(3):
                    session.step(GRADIENT)
            samples = scrape(primary)
            roles = [
                value(samples, "stepwire_replication_role", role=role) for role in ("primary", "standby", "deposed")
            ]
            assert roles == [1, 0, 0]
            assert [value(samples, f"stepwire_replication_{name}") for name in ("in_sync", "pending_steps")] == [1, 0]
            assert value(samples, "stepwire_replication_acknowledged_steps_total") == 3
            assert value(samples, "stepwire_replication_divergences_total") == 0
            assert value(scrape(standby), "stepwire_replication_role", role="standby") == 1
            until(lambda: value(scrape(standby), "stepwire_replication_pending_steps") == 0)
            assert value(scrape(standby), "stepwire_replication_acknowledged_steps_total") == 3
            standby.replication.promote()
            samples = scrape(standby)
            assert value(samples, "stepwire_replication_role", role="primary") == 1
            assert value(samples, "stepwire_replication_promotions_total") == 1
            until(lambda: value(scrape(primary), "stepwire_replication_role", role="deposed") == 1)


def test_other_paths_are_not_there(server: Server) -> None:
    assert server.monitoring.metrics is not None
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.monitoring.metrics.url + "/etc/passwd")
    with refused.value as response:
        assert (response.code, response.read()) == (404, b"not found; metrics are at /metrics\n")
