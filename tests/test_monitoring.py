"""The alerts, the configuration of Prometheus and the dashboard, held to promtool and to the table of metrics."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "monitoring"
COMPOSE = (ROOT / "docker" / "compose.monitoring.yaml").read_text()
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "stepwire.json").read_text())
TABLE = ROOT / "docs" / "monitoring.md"
ALERTS = {"ServerDown", "MemoryNearBudget", "DurableLag", "Refusals", "NonFiniteGradients", "SessionDamaged"}
ALERTS |= {"StandbyMissing", "StandbyLag", "StandbyDiverged", "Promoted"}
METRIC = re.compile(r"\b((?:stepwire|grpc_server)_[a-z_]+?)(?:_bucket)?(?=[{) \[]|$)")


def promtool(*arguments: str, cwd: pathlib.Path = FOLDER) -> str:
    """Run the tool, and return its output."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expressions() -> Iterator[str]:
    """Yield every expression of the dashboard."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def names(text: str) -> set[str]:
    return set(METRIC.findall(text))


def test_the_configuration_and_the_alerts_are_valid() -> None:
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "alerts.yml")


def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_test_a_severity_and_an_action() -> None:
    rules, tests = (FOLDER / "alerts.yml").read_text(), (FOLDER / "alerts_test.yml").read_text()
    assert set(re.findall(r"- alert: Stepwire(\w+)", rules)) == ALERTS
    assert set(re.findall(r"alertname: Stepwire(\w+)", tests)) == ALERTS
    assert len(re.findall(r"severity: (?:warning|critical)\}", rules)) == len(ALERTS)
    assert len(re.findall(r"^          description: ", rules, re.M)) == len(ALERTS)


def test_every_expression_of_the_dashboard_is_understood(tmp_path: pathlib.Path) -> None:
    """As rules, with the variables of Grafana filled in. JSON is YAML."""
    filled = [text.replace("$__rate_interval", "1m").replace("$instance", ".*") for text in expressions()]
    rules = [{"record": f"panel:{index}", "expr": text} for index, text in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "rules.yml", cwd=tmp_path)


def test_a_panel_has_a_place_of_its_own_and_says_what_it_shows() -> None:
    panels = DASHBOARD["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel["description"] and panel["title"] for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_no_panel_can_name_a_session() -> None:
    assert not any("session_id" in text for text in expressions())


def test_the_dashboard_and_the_alerts_use_metrics_that_the_server_has() -> None:
    if not TABLE.exists():
        pytest.skip("docs/monitoring.md, which has the table of metrics, is not there")
    known = set(re.findall(r"^\| `([a-z_]+)` \|", TABLE.read_text(), re.M))
    used = names("\n".join(expressions())) | names((FOLDER / "alerts.yml").read_text())
    assert {name for name in known if name.startswith("stepwire_")} - {"stepwire_build_info"} <= used
    assert used <= known


def test_the_parts_of_the_compose_file_find_one_another() -> None:
    (address,) = re.findall(r"STEPWIRE_METRICS: (\S+)", COMPOSE)
    assert f'targets: ["{address}"]' in (FOLDER / "prometheus.yml").read_text()
    for path in re.findall(r"- \./(monitoring/\S+?):/", COMPOSE):
        assert (ROOT / "docker" / path).exists(), path
    source = (FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    (uid,) = re.findall(r"uid: (\S+)", source)
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {uid}
    assert "url: http://server:9090" in source
    assert '"127.0.0.1:9090:9090"' in COMPOSE
