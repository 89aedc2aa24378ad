"""Clients in JavaScript and Go, written from the contract alone: their training is the one of the Python example."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import stepwire
from stepwire_server.demo import MLP, Digits
from stepwire_server.testing import serving

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
STEPS = int(os.environ.get("STEPWIRE_LANGUAGES_STEPS", "60"))
CUT = 20

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")


def javascript() -> list[str]:
    """Return the command of the example in JavaScript."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (EXAMPLES / "javascript" / "node_modules").exists():
        pytest.skip("the packages are not installed: npm install --prefix examples/javascript")
    return ["node", str(EXAMPLES / "javascript" / "digits.mjs")]


def go() -> list[str]:
    """Return the command of the example in Go."""
    program = EXAMPLES / "go" / "digits"
    if not program.exists():
        pytest.skip("the program is not built: examples/go/build")
    return [str(program)]


class Reference(NamedTuple):
    """The same training by the Python client."""

    first_loss: float
    last_loss: float
    test_accuracy: float


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server for all tests."""
    with serving() as target:
        yield target


@pytest.fixture
def contents(module: Callable[[str], ModuleType]) -> dict[str, Any]:
    """The data that all clients train on."""
    exported: dict[str, Any] = module("export_digits").contents(STEPS)
    return exported


@pytest.fixture(params=[javascript, go], ids=["javascript", "go"])
def train(request: pytest.FixtureRequest, contents: dict[str, Any], target: str, tmp_path: pathlib.Path) -> Any:
    """Train in another language; returns the process that has ended."""
    command = request.param()
    path = tmp_path / "digits.json"

    def run(*flags: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        path.write_text(json.dumps(contents | changes))
        return subprocess.run([*command, *flags, target, str(path)], capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def reference(contents: dict[str, Any], target: str, module: Callable[[str], ModuleType]) -> Reference:
    digits = Digits.load()
    example = module("digits_numpy")
    model = MLP((64, 64, 10), np.random.default_rng(example.SEED))
    with stepwire.connect(target) as client:
        with client.create_session(model.parameters, optimizer=stepwire.Adam(lr=contents["lr"])) as session:
            losses = example.train(model, digits, session.step, range(1, STEPS + 1))
    return Reference(losses[1], losses[STEPS], model.accuracy(digits.test_x, digits.test_y))


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
def test_the_training_is_that_of_the_python_example(train: Any, reference: Reference) -> None:
    """From the same parameters, on the same batches. One image of 360 may fall on the other side by rounding."""
    told = summary(train())
    assert (told["steps"], told["attached"], told["replayed"]) == (STEPS, 1, 0)
    assert told["first_loss"] == pytest.approx(reference.first_loss, rel=1e-6)
    assert told["last_loss"] == pytest.approx(reference.last_loss, abs=1e-4)
    assert told["test_accuracy"] == pytest.approx(reference.test_accuracy, abs=1.5 / 360)
    assert told["test_accuracy"] > (0.95 if STEPS >= 600 else 0.9)


@pytest.mark.slow
def test_a_stream_that_breaks_changes_no_bit(train: Any) -> None:
    """Once before a commit, and once after one, whose reply is then fetched without the gradient."""
    calm, cut = summary(train()), summary(train("--cut", str(CUT)))
    assert (cut.pop("attached"), cut.pop("replayed")) == (3, 1)
    assert (calm.pop("attached"), calm.pop("replayed")) == (1, 0)
    assert cut == calm
    assert len(bytes.fromhex(calm["parameters"])) == hashlib.sha256().digest_size


def test_an_error_has_its_reason(train: Any) -> None:
    done = train(lr=-1.0)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("digits: INVALID_CONFIG: "), done.stderr
    assert "lr" in done.stderr
