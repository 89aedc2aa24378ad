"""A moment of waiting awake: bounded, at rest where it is in vain, and off unless it is asked for."""

from __future__ import annotations

import itertools
import os

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.transports.spin import Spin, spin_microseconds


def clock_of(step_microseconds: float) -> itertools.count[float]:
    return itertools.count(0.0, step_microseconds * 1e-6)


def looks(spin: Spin, *, found_at: int | None) -> int:
    """Wait once, and count the looks; the one with a number finds something."""
    counted = 0

    def ready() -> bool:
        nonlocal counted
        counted += 1
        return counted == found_at

    spin.wait(ready)
    return counted


def test_a_moment_ends_with_the_first_thing_found_or_with_its_time() -> None:
    spin = Spin(50, clock_of(10.0).__next__)
    assert looks(spin, found_at=3) == 3
    assert looks(spin, found_at=None) == 4, "a look each 10 µs, within 50 µs"


def test_moments_in_vain_rest_and_come_again() -> None:
    spin = Spin(50, clock_of(10.0).__next__)
    assert [looks(spin, found_at=None) for _ in range(4)] == [4] * 4
    assert [looks(spin, found_at=1) for _ in range(256)] == [0] * 256
    assert [looks(spin, found_at=1) for _ in range(3)] == [1] * 3


@pytest.mark.parametrize(("cores", "microseconds"), [({0}, 0), ({0, 1}, 40)])
def test_a_process_of_one_core_never_waits_awake(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], microseconds: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert spin_microseconds({"STEPWIRE_LANE_SPIN_MICROSECONDS": "40"}) == microseconds
    assert spin_microseconds({}) == 0


@pytest.mark.parametrize("text", ["51", "-1", "1.5", "soon", "²", ""])
def test_another_moment_is_refused(text: str) -> None:
    name = "STEPWIRE_LANE_SPIN_MICROSECONDS"
    with pytest.raises(InvalidRequestError, match=f"{name}: .* is no whole number from 0 to 50"):
        spin_microseconds({name: text})
