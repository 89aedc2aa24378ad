"""The files for Kubernetes: what they name is there, in the image, in the settings and in one another."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from typing import Any

import pytest
from typer.main import get_command

from stepwire_server.cli.main import app
from stepwire_server.config import load_config
from stepwire_server.processes.announcement import check_announced
from stepwire_server.processes.standby_settings import check_replication
from tests.guards.source import ROOT

yaml = pytest.importorskip("yaml")

FOLDER = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
VERSIONS = ("1.29", "1.31", "1.33", "1.35")


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def base() -> dict[str, Any]:
    """Return the resources of the base by their kinds."""
    names = load("base/kustomization.yaml")["resources"]
    assert {*names} == {path.name for path in (FOLDER / "base").iterdir()} - {"kustomization.yaml"} | {"../server"}
    (servers,) = load("server/kustomization.yaml")["resources"]
    found = [load(f"server/{servers}"), *(load(f"base/{name}") for name in names if name != "../server")]
    return {each["kind"]: each for each in found}


def pod() -> Any:
    return base()["StatefulSet"]["spec"]["template"]


def container() -> Any:
    (only,) = pod()["spec"]["containers"]
    return only


POD = {"metadata.name": "stepwire-0", "metadata.labels['apps.kubernetes.io/pod-index']": "0"}


def variables(*containers: Any) -> dict[str, str]:
    """Return the variables of the first pod, those of later containers in the place of earlier ones."""
    given: dict[str, str] = {}
    for each in (each for one in containers for each in one["env"]):
        if each.get("$patch") == "delete":
            del given[each["name"]]
            continue
        value = each.get("value")
        if value is None:
            value = POD[each["valueFrom"]["fieldRef"]["fieldPath"]]
        given[each["name"]] = re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], value)
    return {name: value for name, value in given.items() if name.startswith("STEPWIRE_")}


def added(overlay: str, file: str = "statefulset.yaml") -> Any:
    """Return the container as an overlay changes it."""
    (only,) = load(f"{overlay}/{file}")["spec"]["template"]["spec"]["containers"]
    assert only["name"] == container()["name"]
    return only


def of_image(pattern: str) -> str:
    found = re.search(pattern, DOCKERFILE)
    assert found is not None, pattern
    return found[1]


def test_settings_and_commands_are_those_of_the_server() -> None:
    config = load_config({}, environment=variables(container()))
    assert (config.insecure, config.drain_seconds, config.shard) == (True, 30.0, "stepwire-0")
    check_announced(config)
    assert config.data_dir.startswith(of_image(r"VOLUME (\S+)") + "/")
    assert load_config({}, environment=variables(container(), added("gpu"))).device == "cuda"
    watched = load_config({}, environment=variables(container(), added("monitoring")))
    assert watched.open_health and watched.tokens.startswith(added("monitoring")["volumeMounts"][0]["mountPath"])
    commands: Any = get_command(app)
    assert set(container()["args"]) <= set(commands.commands)
    assert load("gpu/kustomization.yaml")["resources"] == ["../base"]


def test_ports_probes_paths_and_users_are_those_of_the_image() -> None:
    port = int(of_image(r"STEPWIRE_BIND=0\.0\.0\.0:(\d+)"))
    (open_port,) = container()["ports"]
    assert open_port["containerPort"] == port == int(of_image(r"EXPOSE (\d+)"))
    assert [container()[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")] == [
        {"port": port}
    ] * 3
    (served,) = base()["Service"]["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (port, open_port["name"])
    assert base()["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == open_port["name"]
    security = pod()["spec"]["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == of_image(r"USER (\S+)")
    (mounted,) = container()["volumeMounts"]
    (claim,) = base()["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert (mounted["name"], mounted["mountPath"]) == (claim["metadata"]["name"], of_image(r"VOLUME (\S+)"))
    tags = [load(f"{each}/kustomization.yaml")["images"][0]["newTag"] for each in ("server", "gpu")]
    assert all(f"FROM runtime AS {tag}" in DOCKERFILE for tag in tags)
    (metrics,) = added("monitoring")["ports"]
    assert variables(added("monitoring"))["STEPWIRE_METRICS"].endswith(f":{metrics['containerPort']}")
    assert load("monitoring/servicemonitor.yaml")["spec"]["endpoints"][0]["port"] == metrics["name"]


def test_the_two_servers_of_a_shard_have_its_name_and_no_disk_and_find_one_another() -> None:
    pair = added("standby", "pair.yaml")
    config = load_config({}, environment=variables(container(), pair))
    assert (config.shard, config.data_dir, config.standby, config.standby_of) == (
        "shard-0",
        "",
        "required",
        "directory",
    )
    check_replication(config)
    check_announced(config)
    service, port = base()["Service"]["metadata"]["name"], base()["Service"]["spec"]["ports"][0]["port"]
    assert config.advertise == f"stepwire-0.{service}:{port}"
    (mounted,) = pair["volumeMounts"]
    (before,) = container()["volumeMounts"]
    assert mounted["mountPath"] == before["mountPath"], "it is there in the place of the disk"
    assert config.directory.startswith(mounted["mountPath"] + "/")
    spec = load("standby/pair.yaml")["spec"]
    (volume,) = spec["template"]["spec"]["volumes"]
    claim = load("standby/directory.yaml")
    assert (volume["name"], volume["persistentVolumeClaim"]["claimName"]) == (
        mounted["name"],
        claim["metadata"]["name"],
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and spec["volumeClaimTemplates"] is None
    ingress, egress = (each["value"] for each in load("standby/network.yaml"))
    labels = pod()["metadata"]["labels"]
    assert ingress["from"] == egress["to"] == [{"podSelector": {"matchLabels": labels}}]
    assert (ingress["ports"][0]["port"], egress["ports"][0]["port"]) == (container()["ports"][0]["name"], port)


def test_selectors_find_the_pods_and_a_drain_has_its_time() -> None:
    labels = pod()["metadata"]["labels"]
    selectors = [base()["Service"]["spec"]["selector"]]
    selectors += [base()[kind]["spec"]["selector"]["matchLabels"] for kind in ("StatefulSet", "PodDisruptionBudget")]
    selectors += [base()["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    assert selectors == [labels] * 4
    assert base()["StatefulSet"]["spec"]["serviceName"] == base()["Service"]["metadata"]["name"]
    assert base()["Service"]["spec"]["clusterIP"] == "None"
    drain = float(variables(container())["STEPWIRE_DRAIN_SECONDS"])
    liveness = container()["livenessProbe"]
    assert pod()["spec"]["terminationGracePeriodSeconds"] > 2 * drain
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 2 * drain


def test_a_pod_has_no_rights_and_no_variables_of_services() -> None:
    spec, own = pod()["spec"], container()["securityContext"]
    assert (spec["enableServiceLinks"], spec["automountServiceAccountToken"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def built(overlay: str) -> list[Any]:
    """Return the resources of an overlay."""
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl, which puts the files together, is not installed")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER / overlay)], capture_output=True, check=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.slow
def test_the_pods_of_a_pair_differ_in_their_names_and_one_label_alone() -> None:
    first, second = (each for each in built("standby") if each["kind"] == "StatefulSet")
    assert (first["metadata"]["name"], second["metadata"]["name"]) == ("stepwire", "stepwire-standby")
    for each, side in ((first, "first"), (second, "second")):
        labels = pod()["metadata"]["labels"] | {"stepwire-server": side}
        assert each["spec"]["selector"]["matchLabels"] == each["spec"]["template"]["metadata"].pop("labels") == labels
    assert first["spec"]["template"] == second["spec"]["template"]
    (only,) = first["spec"]["template"]["spec"]["containers"]
    assert variables(only) == variables(container(), added("standby", "pair.yaml"))
    assert "volumeClaimTemplates" not in first["spec"] and first["spec"]["serviceName"] == "stepwire"


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "count"), [("base", 4), ("gpu", 4), ("standby", 6)])
def test_every_version_of_kubernetes_accepts_the_files(overlay: str, count: int) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    resources = built(overlay)
    assert len(resources) == count
    for version in VERSIONS:
        for resource in resources:
            validate.validate(resource, version, strict=True)
