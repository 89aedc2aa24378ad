"""The rate of a tenant's steps: a second's steps at once, then one for each part of a second, and no step twice."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.retry import Retry
from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.sessions.step_rate import StepRate, StepRates
from tests.support.numpy_server import numpy_server

ONES = {"w": np.ones(3, np.float32)}


def admitted(rate: StepRate, now: float) -> int:
    """Make steps until one is refused; return their number."""
    for count in itertools.count():
        try:
            rate.admit(now)
        except ResourceExhaustedError:
            return count
    raise AssertionError


def test_a_second_of_steps_may_come_at_once_and_then_they_come_at_the_rate() -> None:
    rate = StepRate(4)
    assert admitted(rate, 1000.0) == 4
    assert admitted(rate, 1000.25) == 1
    assert admitted(rate, 1000.75) == 2
    assert admitted(rate, 2000.0) == 4, "a long rest saves no more than a second"


def test_a_refusal_has_the_limits_name_and_the_time_until_the_next_step() -> None:
    rate = StepRate(4)
    admitted(rate, 1000.0)
    with pytest.raises(ResourceExhaustedError, match="4 steps a second, its most; .* 0.150 s") as refused:
        rate.admit(1000.1)
    assert refused.value.reason is Reason.TOO_MANY_STEPS
    assert refused.value.metadata == {"limit": "tenant_steps_per_second", "most": "4"}
    assert refused.value.retry_after_seconds == pytest.approx(0.15)
    rate.admit(1000.1 + refused.value.retry_after_seconds)


def test_sessions_of_a_tenant_share_and_other_tenants_have_their_own() -> None:
    rates = StepRates(2)
    assert rates.of("a", 1000.0) is rates.of("a", 1000.0)
    assert rates.of("a", 1000.0) is not rates.of("b", 1000.0)
    assert StepRates(0).of("a", 1000.0) is None


def test_buckets_that_are_full_again_are_forgotten() -> None:
    rates = StepRates(1)
    busy = rates.of("busy", 1000.0)
    assert busy is not None
    busy.admit(1000.0)
    resting, gone = rates.of("resting", 1000.0), weakref.ref(rates.of("gone", 1000.0))  # type: ignore[arg-type]
    for number in range(2000):
        rates.of(f"tenant-{number}", 1000.0)
    assert rates.of("busy", 1000.0) is busy
    assert rates.of("resting", 1000.0) is resting, "a session has it: another one would be a second bucket"
    assert gone() is None


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_client_waits_and_every_step_is_applied_once(clock: Any, transport: str) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += seconds

    retry = Retry(sleep=sleep, uniform=lambda low, high: 0.0)
    with (
        numpy_server(clock=clock, tenant_steps_per_second=2) as server,
        stepwire.connect(server.target, transport=transport, retry=retry) as client,
    ):
        session: Any = client.create_session({"w": np.zeros(3, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
        replies = [session.step(ONES)["w"].tolist() for _ in range(6)]
        assert replies == [[-float(step)] * 3 for step in range(1, 7)]
        assert session.info().applied_step == 6
        assert sum(pauses) == pytest.approx(2.0), "four steps beyond the first two, at two a second"
