"""A process that trains: what it reports, what it returns, and its end by a signal."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def count(last: int | None, report: Callable[[int], None]) -> str:
    """Report numbers up to the last, or for ever."""
    for number in itertools.count(1) if last is None else range(1, last + 1):
        report(number)
    return "done"


def fail(report: Callable[[int], None]) -> None:
    """Report something and break."""
    report(1)
    raise SystemExit(3)


@pytest.fixture
def process(module: Callable[[str], ModuleType]) -> Any:
    return module("training_process").TrainingProcess


def test_reports_come_in_order_and_the_outcome_last(process: Any) -> None:
    with process(count, 5) as training:
        assert list(training.reports()) == [1, 2, 3, 4, 5]
        assert training.returned == "done"
        assert training.exit_code == 0


def test_a_killed_process_leaves_what_it_had_reported(process: Any) -> None:
    with process(count, None) as training:
        seen = []
        for number in training.reports():
            seen.append(number)
            if number == 3:
                training.kill()
        assert seen in ([1, 2, 3], [1, 2, 3, 4])  # one ahead at the most, as fast as it is
        assert training.exit_code == -signal.SIGKILL
        with pytest.raises(RuntimeError, match=r"returned nothing \(exit code -9\)"):
            training.returned  # noqa: B018


def test_a_process_that_fails_has_no_outcome(process: Any) -> None:
    with process(fail) as training:
        assert list(training.reports()) == [1]
        with pytest.raises(RuntimeError, match=r"returned nothing \(exit code 3\); see its own message"):
            training.returned  # noqa: B018


def test_an_error_here_ends_the_process(process: Any) -> None:
    with pytest.raises(KeyError), process(count, None) as training:
        raise KeyError
    assert training.exit_code == -signal.SIGKILL
