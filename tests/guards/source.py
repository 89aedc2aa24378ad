"""The source of both packages, as the guards read it."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLIENT, SERVER = ROOT / "client" / "stepwire", ROOT / "server" / "stepwire_server"


def run(code: str) -> Any:
    """Run code in a Python of its own and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded_by(*modules: str, missing: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Import modules one after another, without some packages; returns the top-level packages loaded after each."""
    return dict(
        run(
            "import importlib, json, sys\n"
            f"sys.modules.update(dict.fromkeys({missing!r}))\n"
            "seen = {}\n"
            f"for name in {modules!r}:\n"
            "    importlib.import_module(name)\n"
            "    seen[name] = sorted({module.partition('.')[0] for module, at in sys.modules.items() if at})\n"
            "print(json.dumps(seen))"
        )
    )


# Doors to the frameworks people train with: who imports one of them has asked for the framework.
ADAPTERS = {"stepwire.optax": "jax", "stepwire.torch": "torch"}


def modules_of(package: Any) -> list[str]:
    """Name the modules of a package, adapters left out: walking into one would import its framework."""
    folders = [(package.__path__, f"{package.__name__}.")]
    names = [package.__name__]
    for path, prefix in folders:
        for found in pkgutil.iter_modules(path, prefix):
            if found.name in ADAPTERS or found.name.endswith("__main__"):
                continue
            names.append(found.name)
            if found.ispkg:
                folders.append(([f"{folder}/{found.name.rpartition('.')[2]}" for folder in path], f"{found.name}."))
    return names


def imports_of(path: pathlib.Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: pathlib.Path) -> list[pathlib.Path]:
    """List the hand-written modules of a package."""
    return [path for path in sorted(package.rglob("*.py")) if "_pb2" not in path.name]


def own_framework(path: pathlib.Path) -> str:
    """Name the framework whose adapter a file belongs to; empty for the others."""
    module = ".".join(path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).with_suffix("").parts)
    return next((framework for name, framework in ADAPTERS.items() if f"{module}.".startswith(f"{name}.")), "")


@functools.cache
def tracked() -> tuple[pathlib.Path, ...]:
    """List the files that are, or would be, in the repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
