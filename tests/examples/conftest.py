"""Examples as their users have them: programs that are run, and modules that import one another by their bare names."""

from __future__ import annotations

import importlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def module() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples, and forget it and what it has imported of them after the test."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def run_quickly(tmp_path: pathlib.Path) -> Run:
    """Run an example in its short form, in an empty folder, and return its summary with the files that it left."""

    def run(name: str, *flags: str) -> dict[str, Any]:
        command = [sys.executable, str(EXAMPLES / name), "--quick", "--json", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout) | {"files": sorted(path.name for path in tmp_path.iterdir())}

    return run
