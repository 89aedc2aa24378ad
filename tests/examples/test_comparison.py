"""What an example prints of its curves, and the exit code that it makes of its checks."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def compared(module: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """Make a comparison of 20 steps, the third curve without step 10."""

    def make(*, holds: bool = True) -> Any:
        local = {step: 1 / step for step in range(1, 21)}
        remote = {step: loss + 1e-6 for step, loss in local.items()}
        killed = {step: loss for step, loss in remote.items() if step != 10}
        curves = {"local": local, "remote": remote, "killed": killed}
        facts, checks = {"share": 2 / 3, "transport": "shm"}, {"they agree": holds}
        return module("comparison").Comparison("a title", curves, facts, checks, {10: "SIGKILL"})

    return make


def test_the_table_has_the_first_step_the_last_and_some_between(compared: Callable[..., Any]) -> None:
    lines = compared().text().splitlines()
    assert lines[0].split() == ["step", "local", "remote", "killed", "difference"]
    assert [line.split()[0] for line in lines[1:12]] == ["1", *(str(step) for step in range(2, 21, 2))]
    assert lines[6].split() == ["10", "0.100000", "0.100001", "—", "1.0e-06"]
    assert lines[12:] == ["", "share      0.666667", "transport  shm", "", "yes  they agree"]


def test_a_run_of_few_steps_shows_each_once(module: Callable[[str], ModuleType]) -> None:
    few = {1: 2.0, 2: 1.0}
    lines = module("comparison").Comparison("", {"a": few, "b": few}, {}, {}).text().splitlines()
    assert [line.split()[0] for line in lines if line[:6].strip().isdigit()] == ["1", "2"]


@pytest.mark.parametrize("holds", [True, False])
def test_a_check_that_fails_is_an_exit_code(
    compared: Callable[..., Any], capsys: pytest.CaptureFixture[str], holds: bool
) -> None:
    assert compared(holds=holds).show(argparse.Namespace(plot="", json=False)) == (0 if holds else 1)
    assert capsys.readouterr().out.splitlines()[-1] == ("yes  they agree" if holds else "NO   they agree")


def test_programs_read_json_and_people_a_plot(
    compared: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "of" / "curves.png"
    assert compared().show(argparse.Namespace(plot=str(path), json=True)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert summary["plot"] == str(path)
    assert summary["curves"]["killed"] | {"10": None} == summary["curves"]["killed"]
    assert summary["curves"]["local"]["20"] == 1 / 20
    assert (summary["facts"], summary["checks"]) == ({"share": 2 / 3, "transport": "shm"}, {"they agree": True})
