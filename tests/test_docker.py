"""The files of the images, as far as a look at them goes; `make image-test` builds and runs them."""

from __future__ import annotations

import pathlib
import re
import tomllib

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stepwire
from stepwire_server.config import ENVIRONMENT_PREFIX, ServerConfig

ROOT = pathlib.Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.shared-memory.yaml"]
FOREIGN = {"CACHE_DIR", "KERNELS", "TRANSPORT"}
EXTRAS = {"cpu": "server", "gpu": "cuda13", "demo": "demo"}


def pins(name: str) -> set[tuple[str, str]]:
    """Return the packages of a lock and their versions; several where that depends on the Python."""
    return set(re.findall(r"^([a-z0-9.-]+)==([^ ]+)", (DOCKER / "requirements" / f"{name}.txt").read_text(), re.M))


def asked(extra: str) -> list[Requirement]:
    """Return what an extra of the project asks for, its own extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][extra]]
    inner = [each for requirement in found if requirement.name == "stepwire" for each in requirement.extras]
    return [each for each in found if each.name != "stepwire"] + [each for name in inner for each in asked(name)]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_is_what_the_project_asks_for(name: str) -> None:
    for requirement in asked(EXTRAS[name]):
        versions = [version for package, version in pins(name) if package == canonicalize_name(requirement.name)]
        assert versions, f"{requirement.name} is not locked; make lock"
        assert all(version in requirement.specifier for version in versions), f"{requirement}: {versions}; make lock"


@pytest.mark.parametrize("name", ["build", "sbom", *EXTRAS])
def test_every_pin_has_hashes_and_no_place(name: str) -> None:
    """Wherever the wheels come from, they are the same; where they were looked for is nobody's business."""
    text = (DOCKER / "requirements" / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=\S)", text)
    assert all("--hash=sha256:" in block for block in blocks if "==" in block.partition("\n")[0])
    assert not re.search(r"https?://|--index|--find-links|file:", text)


@pytest.mark.parametrize("name", EXTRAS)
def test_images_have_what_optional_settings_need(name: str) -> None:
    """Whoever runs an image cannot install an extra."""
    locked = {package for package, _ in pins(name)}
    for extra in ("objects", "tls", "jwt", "metrics", "otel", "reflection"):
        assert {canonicalize_name(each.name) for each in asked(extra)} <= locked, f"{extra} is not locked; make lock"


def test_every_image_lists_its_contents_where_its_label_says() -> None:
    """Each target writes the list anew, over that of the target below it."""
    (path,) = re.findall(r'io\.github\.stepwire\.sbom="([^"]+)"', DOCKERFILE)
    stages = re.findall(r"^FROM \S+ AS (packages\S*)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert [name for name, _ in stages] == ["packages", "packages-gpu", "packages-demo"]
    listing = f"--output-file {path} /opt/stepwire/bin/python3\n"
    assert [stage.count(listing) for _, stage in stages] == [1, 1, 1]


@pytest.mark.parametrize("name", ["gpu", "demo"])
def test_the_larger_images_hold_the_versions_of_the_smaller(name: str) -> None:
    assert pins(name) > pins("cpu")


def test_the_dockerfile_is_for_every_builder() -> None:
    """None of what only BuildKit knows."""
    instructions = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    assert not re.search(r"<<|--mount=|--link|--chmod=|--start-interval|^ADD ", instructions, re.M)
    assert "# syntax" not in DOCKERFILE
    assert 'ENTRYPOINT ["stepwire"]' in instructions
    assert re.findall(r"^FROM \S+ AS (cpu|gpu|demo)$", instructions, re.M) == ["cpu", "gpu", "demo"]


@pytest.mark.parametrize("file", [DOCKER / "Dockerfile", *COMPOSE], ids=lambda file: file.name)
def test_every_variable_of_ours_is_known(file: pathlib.Path) -> None:
    """A server refuses those that are not."""
    known = {field.name.upper() for field in msgspec.structs.fields(ServerConfig)} | FOREIGN
    named = set(re.findall(rf"{ENVIRONMENT_PREFIX}([A-Z_]+)", file.read_text()))
    assert named
    assert named <= known


def test_a_server_fills_no_disk_with_its_log() -> None:
    """Docker keeps every line for ever by default."""
    text = COMPOSE[0].read_text()
    assert re.search(
        r'logging: &logging\n    driver: json-file\n    options: { max-size: \d+m, max-file: "\d+" }\n', text
    )
    assert text.count("logging: *logging") == 1


def test_an_image_tells_its_version_and_revision() -> None:
    labels = set(re.findall(r'org\.opencontainers\.image\.(version|revision)="\$\{([A-Z]+)\}"', DOCKERFILE))
    assert labels == {("version", "VERSION"), ("revision", "REVISION")}
    build = (DOCKER / "build").read_text()
    (expression,) = re.findall(r"sed -n '(.*)' client/stepwire/version.py", build)
    pattern = expression.removeprefix("s/").partition("/\\1/")[0].replace("\\(", "(").replace("\\)", ")")
    assert re.findall(pattern, (ROOT / "client/stepwire/version.py").read_text(), re.M) == [stepwire.__version__]
    assert all(f'--build-arg "{name}=$' in build for name in ("VERSION", "REVISION"))


def test_docker_waits_longer_than_the_drain() -> None:
    text = COMPOSE[0].read_text()
    (drain,), (grace,) = re.findall(r'DRAIN_SECONDS: "(\d+)"', text), re.findall(r"stop_grace_period: (\d+)s", text)
    assert int(grace) >= int(drain) + 5
