"""A real Prometheus scrapes a real server: every expression of the dashboard and of the alerts has values there."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parents[2] / "docker" / "monitoring"
PATIENCE_SECONDS = 120.0
ABSENT = {"GPU memory", "GPU use"}  # this machine has none

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
if shutil.which("prometheus") is None:
    pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)", allow_module_level=True)
if "metrics" not in {field.name for field in msgspec.structs.fields(ServerConfig)}:
    pytest.skip("this server has no metrics", allow_module_level=True)


class Prometheus(NamedTuple):
    """A Prometheus, by its address."""

    url: str

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
            return json.load(answer)["data"]

    def result(self, expression: str) -> list[Any]:
        """Evaluate an expression, with the variables of Grafana filled in."""
        filled = expression.replace("$__rate_interval", "10s").replace("$instance", ".*")
        found: list[Any] = self.get("query", query=filled)["result"]
        return found

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.result(expression):
            assert time.monotonic() < end, f"{expression} has no value"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrape servers on which sessions step: with and without a journal or a standby, and with NaN now and then."""
    folder = tmp_path_factory.mktemp("prometheus")
    with contextlib.ExitStack() as servers:
        server, target = _measured(servers, data_dir=str(folder / "sessions"))
        pair = {"directory": str(folder / "directory"), "shard": "a"}
        primary, target_of_primary = _measured(servers, standby="required", **pair)
        _, target_of_standby = _measured(servers, standby_of=primary.target, **pair)
        with (
            stepwire.connect(server.target) as client,
            stepwire.connect(primary.target) as other,
            _Scraping(folder, [target, target_of_primary, target_of_standby]) as found,
        ):
            replicated = _session(other, durability="replicated")
            journal = _session(client, durability="journal")
            memory = _session(client)
            for step in range(8):
                gradient = {"w": np.full(10, np.nan if step == 3 else 1.0, np.float32)}
                journal.step(gradient)
                memory.step(gradient)
                replicated.step(gradient)
            with pytest.raises(stepwire.NonFiniteGradientError):
                client.create_session({"w": np.zeros(10, np.float32)}).step({"w": np.full(10, np.nan, np.float32)})
            journal.save_checkpoint("one")
            found.wait_for('sum(stepwire_steps_total{outcome="skipped"}) >= 3')
            found.wait_for("rate(stepwire_steps_total[10s])")
            yield found


def _measured(servers: contextlib.ExitStack, **settings: Any) -> tuple[Server, str]:
    """Start a server, and return it and the address of its metrics."""
    common: dict[str, Any] = {"bind": "127.0.0.1:0", "metrics": "127.0.0.1:0", "device": "cpu"}
    with capture_logs() as lines:
        server = servers.enter_context(Server(ServerConfig(**common | settings)))
    (url,) = (line["url"] for line in lines if line["event"] == "metrics")
    return server, urllib.parse.urlsplit(url).netloc


def _session(client: stepwire.Client, **options: Any) -> stepwire.Session:
    return client.create_session({"w": np.zeros(10, np.float32)}, non_finite="skip", **options)


class _Scraping:
    """Run Prometheus for a block, with the files of the containers but for the address and the pauses."""

    def __init__(self, folder: pathlib.Path, targets: list[str]) -> None:
        written = (FOLDER / "prometheus.yml").read_text()
        text = re.sub(r'targets: \["127\.0\.0\.1:\d+"\]', f"targets: {json.dumps(targets)}", written)
        (folder / "prometheus.yml").write_text(re.sub(r"interval: \d+s", "interval: 1s", text))
        shutil.copy(FOLDER / "alerts.yml", folder)
        command = ["prometheus", "--web.listen-address=127.0.0.1:0", f"--storage.tsdb.path={folder / 'data'}"]
        self._process = subprocess.Popen(
            [*command, f"--config.file={folder / 'prometheus.yml'}"], stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Prometheus:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r'msg="Listening on" address=(127\.0\.0\.1:[1-9]\d*)', line):
                return Prometheus(f"http://{found[1]}")
        raise AssertionError("Prometheus did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()


def test_every_panel_of_the_dashboard_has_values(prometheus: Prometheus) -> None:
    dashboard = json.loads((FOLDER / "grafana" / "dashboards" / "stepwire.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            if panel["title"] not in ABSENT:
                prometheus.wait_for(target["expr"])


def test_every_alert_is_evaluated_and_none_fires_on_a_sound_server(prometheus: Prometheus) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        (group,) = prometheus.get("rules")["groups"]
        states = {(rule["health"], rule["state"] == "firing") for rule in group["rules"]}
        if states == {("ok", False)}:
            return
        assert time.monotonic() < end, group
