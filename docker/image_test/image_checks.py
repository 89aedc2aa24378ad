"""What an image says of itself, and how large it is."""

from __future__ import annotations

import json
from typing import Any, Final

from commands import run
from report import Report, require

__all__ = ["check_images"]

_GOALS_BYTES: Final = {"base": 250_000_000, "cpu": 490_000_000}
"""Of the second, some 40 MB are what object stores, certificates, JSON web tokens, metrics and traces need."""
_SBOM: Final = "io.github.stepwire.sbom"
_INSTALLED: Final = (
    "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
)
_LABELS: Final = {
    f"org.opencontainers.image.{name}" for name in ("title", "description", "source", "licenses", "version", "revision")
}


def check_images(report: Report, names: dict[str, str]) -> None:
    """Look at images, by what they are."""
    sizes = {what: _inspected(name)["Size"] for what, name in names.items()}
    for what, size_bytes in sizes.items():
        with report.showing(f"the {what} image has a size") as figures:
            goal = _GOALS_BYTES.get(what)
            figures.append(f"{size_bytes / 1e6:.0f} MB")
            figures += [] if goal is None else [f"goal {goal / 1e6:.0f} MB"]
            require(goal is None or size_bytes <= goal, figures)
    for what in set(names) - {"base"}:
        with report.showing(f"the {what} image says how it is run") as figures:
            figures += _described(what, _inspected(names[what])["Config"])
        with report.showing(f"the {what} image has a list of its contents") as figures:
            figures += _listed(names[what], _inspected(names[what])["Config"]["Labels"])


def _inspected(name: str) -> dict[str, Any]:
    (image,) = json.loads(run("docker", "image", "inspect", name))
    return dict(image)


def _listed(image: str, labels: dict[str, str]) -> list[str]:
    """Compare the list with the distributions that Python finds in the image."""
    path = labels.get(_SBOM, "")
    listed = json.loads(run("docker", "run", "--rm", "--entrypoint", "cat", image, path))
    python = ("--entrypoint", "/opt/stepwire/bin/python3")
    installed = json.loads(run("docker", "run", "--rm", *python, image, "-c", _INSTALLED))
    require((listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6"), listed["bomFormat"])
    contents = {(each["name"], each["version"]) for each in listed["components"]}
    require(
        contents == {(name, version) for name, version in installed}, contents ^ {tuple(each) for each in installed}
    )
    require(any(name == "stepwire" for name, _ in contents), contents)
    return [f"{len(contents)} distributions", path]


def _described(what: str, config: dict[str, Any]) -> list[str]:
    require(config["User"] == "10001:10001", config["User"])
    require(config["Entrypoint"] == ["stepwire"], config["Entrypoint"])
    require(config["StopSignal"] == "SIGTERM", config.get("StopSignal"))
    require(set(config["Volumes"]) == {"/var/lib/stepwire"}, config["Volumes"])
    require(set(config["Labels"]) >= _LABELS, config["Labels"])
    variables = dict(item.split("=", 1) for item in config["Env"])
    require(not any(name.startswith("PIP_") for name in variables), variables)
    require("STEPWIRE_INSECURE" not in variables, variables)
    if what != "demo":
        require(config["Healthcheck"]["Test"] == ["CMD", "stepwire", "health"], config.get("Healthcheck"))
    if what == "gpu":
        asked = (variables["NVIDIA_VISIBLE_DEVICES"], variables["NVIDIA_DRIVER_CAPABILITIES"])
        require(asked == ("all", "compute,utility"), asked)
    return [f"user {config['User']}", f"entry point {config['Entrypoint']}", f"command {config['Cmd']}"]
