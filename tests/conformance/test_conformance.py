"""This repository's server against the vectors of the reference frameworks, and the vectors and bounds themselves."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import stepwire_server.testing
from conformance.checking import NOT_SERVED, PASSED, check
from conformance.judging import parameter_misses
from conformance.stored_case import VECTORS, StoredCase, stored_cases
from conformance.tensor_file import read_tensors, write_tensors
from stepwire.v1 import optimizer_pb2
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

ROOT = pathlib.Path(__file__).parents[2]
CASES = {case.name: case for case in stored_cases()}


def _firsts(kind: str) -> set[str]:
    """Return the first case of each rule or family that does not run on defaults."""
    firsts: dict[str, str] = {}
    for case in CASES.values():
        if not case.name.endswith("-defaults"):
            firsts.setdefault(getattr(case, kind), case.name)
    return set(firsts.values())


# A thousand unary steps take most of a second, and a kernel two to compile: one case a rule takes all steps, and one a
# family in CI, where the kernels are compiled ones.
IN_CI = os.environ.get("CI") == "true"
LONG = _firsts("rule") | (_firsts("family") if IN_CI else set())


@pytest.fixture(scope="module")
def on_numpy() -> Iterator[grpc.Channel]:
    with numpy_server() as server, grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def on_any_kernels(on_numpy: grpc.Channel) -> Iterator[grpc.Channel]:
    """A server with compiled kernels in CI; else with NumPy, which has the same bits."""
    if not IN_CI:
        yield on_numpy
        return
    with stepwire_server.testing.serving() as target, grpc.insecure_channel(target) as channel:
        yield channel


def require_passed(channel: grpc.Channel, case: StoredCase, last_step: int | None) -> None:
    """Check a case; a step has a reply always, since one without is another kernel, which takes long to compile."""
    result = check(channel, case, last_step, always_reply=True)
    if result.outcome == NOT_SERVED:
        pytest.skip(f"feature {result.detail!r} is not served")
    assert result.outcome == PASSED, f"{result.fraction:.3g} of what is allowed: {result.detail} ({case.reference})"


@pytest.mark.parametrize("name", CASES)
def test_the_server_computes_what_the_framework_computes(name: str, on_numpy: grpc.Channel) -> None:
    """The first steps of every case; compiled kernels have the bits of NumPy, see `tests/server/engines`."""
    require_passed(on_numpy, CASES[name], max(10, CASES[name].checkpoints[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_it_does_so_to_the_end(name: str, on_any_kernels: grpc.Channel) -> None:
    require_passed(on_any_kernels, CASES[name], None)


# --- the vectors ----------------------------------------------------------------------------------------------


def test_every_rule_and_formula_has_a_case() -> None:
    optimizers = [case.config.optimizer for case in CASES.values()]
    assert {optimizer.rule for optimizer in optimizers} == set(optimizer_pb2.Rule.values()) - {0}
    assert {optimizer.formula for optimizer in optimizers} == set(optimizer_pb2.Formula.values())
    assert {optimizer.amsgrad for optimizer in optimizers} >= {0, 2, 3}
    kinds = {group.schedule.kind for case in CASES.values() for group in case.config.groups}
    assert kinds == set(optimizer_pb2.ScheduleKind.values())


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_whole(name: str) -> None:
    case = CASES[name]
    frozen = {tensor.name for tensor in case.config.tensors if tensor.frozen}
    for tensor in case.config.tensors:
        assert case.initial[tensor.name].shape == tuple(tensor.shape)
        assert case.gradients[tensor.name].shape[1:] == tuple(tensor.shape)
    for expected, dtype in ((case.expected, np.float64), (case.expected_float32, np.float32)):
        assert expected.keys() == {"param", *case.slots}
        for name_, values in expected["param"].items():
            assert values.dtype == dtype and len(values) == len(case.checkpoints)
            assert np.isfinite(values).all()
            assert name_ not in frozen or np.array_equal(values[-1], case.initial[name_])
    for number in case.checkpoints:
        assert case.special(number).begin.step == 0
        assert len(case.telemetry(number).groups) in (0, max(1, len(case.config.groups)))


def test_the_folder_is_small_and_names_are_unique() -> None:
    files = list(VECTORS.iterdir())
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(1 for _ in stored_cases()) == len(CASES)


def test_tensors_come_back_as_they_were_written(tmp_path: pathlib.Path) -> None:
    tensors = {"b/x": np.arange(6.0).reshape(2, 3), "a": np.float32([1, -0.0, np.inf]), "scalar": np.array(2.0)}
    write_tensors(tmp_path / "file", tensors)
    found = read_tensors(tmp_path / "file")
    assert list(found) == sorted(tensors)
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        assert found[key].tobytes() == value.tobytes()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_still_computes_the_vectors() -> None:
    command = [sys.executable, str(ROOT / "conformance" / "generate.py"), "--check", "--framework", "torch"]
    done = subprocess.run([*command, "--only", "*-defaults"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the bounds -----------------------------------------------------------------------------------------------


def _share(case: StoredCase, answer: dict[str, np.ndarray], index: int) -> float:
    """Return the largest error at a checkpoint as a fraction of its bound."""
    actual = {name: values[index].astype(np.float32) for name, values in answer.items()}
    return max(miss.fraction for miss in parameter_misses(case, index, actual))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("adam-torch", "adam-keras"),
        ("adam-torch", "adam-torch-l2"),
        ("adam-optax", "adam-optax-eps-root"),
        ("adam-optax", "adam-optax-nesterov"),
        ("adamw-torch", "adamw-decay-after"),
        ("clip-torch-tiny", "clip-optax-tiny"),
        ("lars", "lars-nesterov"),
        ("nadam", "nadam-l2"),
        ("sgd-momentum", "sgd-nesterov"),
    ],
)
def test_the_bounds_tell_formulas_apart(name: str, other: str) -> None:
    """From the first step or, where two forms begin alike, from the second."""
    case, wrong = CASES[name], CASES[other].expected["param"]
    assert max(_share(case, wrong, index) for index in (0, 1)) > 5
    assert _share(case, dict(case.expected["param"]), 1) <= 1


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].reference.startswith("torch")])
def test_torchs_own_float32_keeps_the_bounds(name: str) -> None:
    case = CASES[name]
    for index in range(len(case.checkpoints)):
        assert _share(case, dict(case.expected_float32["param"]), index) <= 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("index", [0, 2])
def test_a_number_that_is_none_fails(wrong: float, index: int) -> None:
    case = CASES["sgd"]
    answer = {name: values.copy() for name, values in case.expected["param"].items()}
    answer["bias"][index, 1] = wrong
    assert _share(case, answer, index) == math.inf
