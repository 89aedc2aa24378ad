"""The demo in a short form: a server in a process of its own, trained against, and the difference told."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server import demo

STEPS = 60


@pytest.mark.slow
def test_a_short_demo_trains_and_agrees_with_a_local_adam(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "stepwire_server", "demo", "--device", "cpu", "--json"]
    done = subprocess.run(
        [*command, "--steps", str(STEPS), "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["device"], report["steps"]) == ("cpu", STEPS)
    assert report["largest_difference"] < 1e-5
    assert report["test_accuracy"] > 0.6
    assert report["steps_per_second"] > 1.0
    assert pathlib.Path(report["plot"]) == folder / "digits-loss.png"
    assert (folder / "digits-loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_server_may_be_one_that_runs(server: Any, tmp_path: pathlib.Path) -> None:
    with stepwire.connect(server.target) as client:
        before = client.info().sessions
        report = demo.run_demo(steps=30, output=tmp_path, target=server.target, quiet=True)
        assert (report.device, report.steps, client.info().sessions) == ("cpu", 30, before)
    assert report.transport in ("packets", "shm", "uds", "tcp")
    assert report.largest_difference < 1e-5


def test_a_folder_that_cannot_be_written_is_told_before_the_training(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(stepwire.InvalidRequestError, match=r"'.*file' cannot be written: .*; name another folder with"):
        demo.run_demo(steps=10**9, output=file, target="127.0.0.1:1", quiet=True)


def test_the_report_is_told_in_words() -> None:
    report = demo.DemoReport("cpu", "shm", 1000, 812.6, 0.9722, 1.25e-7, "/x/loss.png")
    assert report.text().splitlines() == [
        "optimizer state on      cpu, reached by shm",
        "steps                   1000 (813 steps/s, gradients included)",
        "test accuracy           0.9722",
        "difference to local     1.25e-07 (largest, against a float64 Adam fed the same gradients)",
        "loss curves             /x/loss.png",
    ]


def test_the_data_is_split_once_and_for_all() -> None:
    one, two = demo.Digits.load(), demo.Digits.load()
    assert all(np.array_equal(mine, other) for mine, other in zip(one, two, strict=True))
    assert (len(one.train_y), len(one.test_y)) == (1437, 360)
    assert one.train_x.dtype == np.float32
    assert (one.train_x.min(), one.train_x.max()) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_the_gradients_of_the_demo_are_right(name: str) -> None:
    """Against finite differences, in a random direction."""
    random = np.random.default_rng(3)
    model = demo.MLP((6, 5, 4), random)
    model.parameters = {key: value.astype(np.float64) for key, value in model.parameters.items()}
    x, y = random.standard_normal((7, 6)), random.integers(0, 4, 7)
    _, gradients = model.loss_and_gradients(x, y)
    direction = random.standard_normal(model.parameters[name].shape)
    start, losses = model.parameters[name].copy(), []
    for sign in (1, -1):
        model.parameters[name] = start + sign * 1e-6 * direction
        losses.append(model.loss_and_gradients(x, y)[0])
    slope: Any = (losses[0] - losses[1]) / 2e-6
    assert slope == pytest.approx(float((gradients[name] * direction).sum()), rel=1e-5)


def test_the_demos_reference_is_the_papers_adam() -> None:
    """By hand, for one element: two steps with gradients 1 and -2."""
    adam = demo.ReferenceAdam({"w": np.zeros(1, np.float32)}, lr=0.1)
    for gradient in (1.0, -2.0):
        adam.step({"w": np.full(1, gradient, np.float32)})
    m, v = 0.9 * 0.1 - 0.1 * 2, 0.999 * 0.001 + 0.001 * 4
    second = 0.1 * (m / (1 - 0.81)) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
    expected = -0.1 / (1 + 1e-8) - second
    assert adam.parameters["w"][0] == pytest.approx(expected, rel=1e-12)
    assert adam.largest_difference({"w": np.full(1, expected + 0.25)}) == pytest.approx(0.25)
