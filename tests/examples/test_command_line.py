"""The flags that all examples have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType

import pytest

Read = Callable[..., argparse.Namespace]


@pytest.fixture
def read(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Read:
    def read(*flags: str, also: argparse.ArgumentParser | None = None) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["example.py", *flags])
        options: argparse.Namespace = module("command_line").command_line(
            "what it is", steps=500, quick_steps=40, plot="x.png", also=also
        )
        return options

    return read


@pytest.mark.parametrize(
    ("flags", "steps", "plot"),
    [
        ((), 500, "x.png"),
        (("--quick",), 40, ""),
        (("--quick", "--steps", "7", "--plot", "y.png"), 7, "y.png"),
        (("--plot", ""), 500, ""),
    ],
)
def test_the_short_form_takes_fewer_steps_and_draws_nothing_unless_told(
    read: Read, flags: tuple[str, ...], steps: int, plot: str
) -> None:
    options = read(*flags)
    assert (options.steps, options.plot, options.json, options.target) == (steps, plot, False, None)


def test_an_example_may_have_flags_of_its_own(read: Read) -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--threads", type=int, default=1)
    assert read("--threads", "3", also=own).threads == 3


def test_too_few_steps_are_refused(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--steps", "0")
    assert "--steps 0: at least 1" in capsys.readouterr().err


def test_a_target_is_taken_as_it_is(module: Callable[[str], ModuleType]) -> None:
    with module("command_line").a_server("host:1") as target:
        assert target == "host:1"
