"""Guards of the files: generated code is fresh, and nothing is kept that tells of a machine or is made by a tool."""

from __future__ import annotations

import importlib
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.guards.source import CLIENT, ROOT, SERVER, tracked

GENERATOR = "1.76.0"


def generator() -> str | None:
    """Find a Python that has the pinned toolchain: this one, or the one that `make proto` made."""
    probe = "import importlib.metadata as m; print(m.version('grpcio-tools'))"
    for python in (sys.executable, str(ROOT / ".venv-proto" / "bin" / "python")):
        if shutil.which(python) is None:
            continue
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if done.stdout.strip() == GENERATOR:
            return python
    return None


def test_generated_code_is_fresh(tmp_path: pathlib.Path) -> None:
    """As `make proto` would make it now, to the byte."""
    python = generator()
    if python is None:
        pytest.skip(f"grpcio-tools=={GENERATOR} is neither installed here nor in .venv-proto; `make proto` installs it")
    protoc = [python, "-m", "grpc_tools.protoc", "-Iproto"]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    service = [source for source in sources if source.endswith("/optimizer_service.proto")]  # servers alone replicate
    for command in (
        [*protoc, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *sources],
        [*protoc, f"--grpc_python_out={tmp_path}", *service],
    ):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "stepwire" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (CLIENT / "v1").glob("*_pb2*.py*")}
    assert set(fresh) == set(committed)
    assert [name for name in fresh if fresh[name] != committed[name]] == []


def test_every_file_of_the_contract_names_its_packages_in_other_languages() -> None:
    """One package for all files in each language, and an outer class of Java for each that no message is named like."""
    files = [
        importlib.import_module(f"stepwire.v1.{path.stem}_pb2").DESCRIPTOR
        for path in sorted((ROOT / "proto/stepwire/v1").glob("*.proto"))
    ]
    messages = {name for file in files for name in (*file.message_types_by_name, *file.enum_types_by_name)}
    outer = set()
    for file in files:
        options = file.GetOptions()
        assert options.go_package == "github.com/stepwire/stepwire/proto/stepwire/v1;stepwirev1", file.name
        assert (options.java_package, options.java_multiple_files) == ("io.github.stepwire.v1", True), file.name
        assert options.csharp_namespace == "Stepwire.V1", file.name
        assert (options.php_namespace, options.ruby_package) == ("Stepwire\\V1", "Stepwire::V1"), file.name
        outer.add(options.java_outer_classname)
    assert len(outer) == len(files) and not outer & (messages | {""})


def test_no_file_tells_of_the_machine_it_was_written_on() -> None:
    homes = re.compile(r"(?:^|[\s\"'`=(:])/(?:home|Users|root)/[\w.-]+|[A-Z]:\\Users\\")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if homes.search(text) or str(ROOT) in text:
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_nothing_that_is_made_is_kept() -> None:
    made = re.compile(r"(^|/)(__pycache__|\.venv[^/]*|\.hypothesis|\.pytest_cache|dist|build)/|\.(pyc|so|egg-info)$")
    assert [str(path.relative_to(ROOT)) for path in tracked() if made.search(str(path.relative_to(ROOT)))] == []


def test_folders_that_are_no_packages_have_no_init() -> None:
    for folder in ("proto", "client", "server", "docker"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert {path.parent.name for path in (CLIENT, SERVER)} == {"client", "server"}
    for package in (CLIENT, SERVER):
        assert (package / "py.typed").read_bytes() == b""
