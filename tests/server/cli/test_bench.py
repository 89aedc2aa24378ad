"""`stepwire bench`: what it measures, and that it leaves nothing on the server."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.cli.bench import BenchReport, measure

REPORT = BenchReport(1_000_000, 100, "shm", "cpu", 512.34, 0.0019, 0.0123, 0.00075, 0.00002, 2.04936e9)


def test_the_times_are_those_of_the_clock(server: Any) -> None:
    """Each of 100 steps lasts one second by the clock of the test, but the last, which lasts ten."""
    ticks = itertools.chain(range(100), [109])
    with stepwire.connect(server.target) as client:
        with client.create_session({"w": np.zeros((5, 2), np.float32)}) as session:
            report = measure(session, 100, lambda: float(next(ticks)))
            assert session.applied_step == 105
    assert (report.parameters, report.steps, report.device) == (10, 100, "cpu")
    assert report.steps_per_second == pytest.approx(100 / 109)
    assert report.p50_seconds == 1.0
    assert report.p99_seconds == pytest.approx(1.09)  # between the two longest, 1 and 10
    assert report.gradient_bytes_per_second == pytest.approx(40 * 100 / 109)
    assert 0.0 <= report.queue_seconds < 60.0
    assert 0.0 < report.apply_seconds < 60.0


def test_a_server_is_measured_and_left_as_it_was(command: Any, server: Any) -> None:
    arguments = ("bench", "-t", server.target, "--parameters", "1000", "--steps", "3", "--transport", "tcp")
    with stepwire.connect(server.target) as client:
        before = client.info().sessions
        code, out, err = command(*arguments, "--json")
        assert client.info().sessions == before
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["parameters"], told["steps"], told["transport"], told["device"]) == (1000, 3, "tcp", "cpu")
    assert 0.0 < told["p50_seconds"] <= told["p99_seconds"]


def test_the_report_is_told_in_words() -> None:
    assert REPORT.text().splitlines() == [
        "session           1,000,000 parameters, Adam, float32, on cpu by shm",
        "steps             100, 512.3 a second",
        "time of a step    p50 1.900 ms, p99 12.300 ms",
        "of it the server  apply 0.750 ms, queue 0.020 ms (medians)",
        "gradients         2,049.4 MB/s, and as much back",
    ]


def test_a_session_without_parameters_is_refused(command: Any) -> None:
    code, out, err = command("bench", "--parameters", "0")
    assert (code, out, "'--parameters'" in err) == (2, "", True)
