"""The schedules' values: by hand, by their properties, and against torch's own schedulers."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.schedules import SCHEDULE_KINDS, Schedule
from stepwire_server.rules.schedules import factor

STEPS = 40
WITH_AN_END = ("linear", "cosine", "polynomial", "one_cycle")
FACTORS = st.floats(0.0, 1e6) | st.sampled_from([0.0, 1.0, sys.float_info.max, 5e-324])


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(SCHEDULE_KINDS), warmup: int = 0) -> Schedule:
    """Draw a whole schedule of one of the kinds, with at least so much warm-up."""
    kind: Any = draw(st.sampled_from(kinds))
    longest = draw(st.sampled_from([50, 2**53 - 2]))
    fields: dict[str, Any] = {"warmup_steps": draw(st.integers(max(warmup, kind == "one_cycle"), longest))}
    if fields["warmup_steps"]:
        fields["warmup_start_factor"] = draw(FACTORS)
    if kind in WITH_AN_END:
        fields["total_steps"] = fields["warmup_steps"] + draw(st.integers(1, 2**53 - 1 - fields["warmup_steps"]))
        fields["final_factor"] = draw(FACTORS)
    if kind in ("step", "exponential", "polynomial"):
        fields["gamma"] = draw(st.floats(0.0, 1e3, exclude_min=True))
    if kind == "step":
        fields["interval_steps"] = draw(st.integers(1, longest))
    schedule = Schedule(kind=kind, **fields)
    schedule.check()
    return schedule


# --- by hand --------------------------------------------------------------------------------------------------

HALF = math.sqrt(0.5)  # the cosine of an eighth of a turn


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.constant(), [1, 1, 1]),
        (Schedule.constant(4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (Schedule.constant(2, warmup_start_factor=0.5), [0.5, 0.75, 1, 1]),
        (Schedule.constant(2, warmup_start_factor=3.0), [3, 2, 1, 1]),
        (Schedule.linear(4), [1, 0.75, 0.5, 0.25, 0, 0, 0]),
        (Schedule.linear(4, final_factor=0.5, warmup_steps=2), [0, 0.5, 1, 0.75, 0.5, 0.5]),
        (Schedule.linear(2, final_factor=3.0), [1, 2, 3, 3]),
        (Schedule.cosine(4), [1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0, 0]),
        (Schedule.cosine(3, final_factor=0.5, warmup_steps=1), [0, 1, 0.75, 0.5, 0.5]),
        (Schedule.step(2, 0.5), [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (Schedule.step(2, 0.5, warmup_steps=1), [0, 1, 1, 0.5, 0.5, 0.25]),
        (Schedule.exponential(0.5), [1, 0.5, 0.25, 0.125]),
        (Schedule.exponential(2.0, warmup_steps=2, warmup_start_factor=0.5), [0.5, 0.75, 1, 2, 4]),
        (Schedule.polynomial(4, 2.0), [1, 0.5625, 0.25, 0.0625, 0, 0]),
        (Schedule.polynomial(4, 2.0, final_factor=0.5), [1, 0.78125, 0.625, 0.53125, 0.5, 0.5]),
        (Schedule.polynomial(4, 0.5), [1, math.sqrt(0.75), HALF, 0.5, 0, 0]),
        (
            Schedule.one_cycle(6, rise_fraction=1 / 3, initial_factor=0.5, final_factor=0.25),
            [0.5, 0.75, 1, 0.25 + 0.75 * (1 + HALF) / 2, 0.625, 0.25 + 0.75 * (1 - HALF) / 2, 0.25, 0.25],
        ),
    ],
)
def test_values_by_hand(schedule: Schedule, expected: list[float]) -> None:
    values = [factor(schedule, updates) for updates in range(len(expected))]
    assert values == pytest.approx(expected, rel=1e-15, abs=1e-15)


# --- properties -----------------------------------------------------------------------------------------------


@given(schedules(), st.integers(0, 2**53))
def test_a_factor_is_finite_and_not_negative(schedule: Schedule, updates: int) -> None:
    value = factor(schedule, updates)
    assert isinstance(value, float)
    assert 0.0 <= value < math.inf


@given(schedules(warmup=1))
def test_warmup_begins_at_its_start_and_ends_at_one(schedule: Schedule) -> None:
    assert factor(schedule, 0) == schedule.warmup_start_factor
    assert factor(schedule, schedule.warmup_steps) == 1.0


@given(schedules(warmup=2))
def test_the_end_of_the_warmup_is_no_jump(schedule: Schedule) -> None:
    """The last step of a warm-up is no larger than the whole way over its updates, or half of π that for a cosine."""
    start, last = schedule.warmup_start_factor, factor(schedule, schedule.warmup_steps - 1)
    slope = math.pi / 2 if schedule.kind == "one_cycle" else 1.0
    longest = slope * abs(1.0 - start) / schedule.warmup_steps
    assert abs(1.0 - last) <= longest * (1 + 1e-9) + 1e-15 * max(1.0, start)


@given(schedules(kinds=WITH_AN_END))
def test_the_end_is_hit_exactly_and_kept(schedule: Schedule) -> None:
    for updates in (schedule.total_steps, schedule.total_steps + 1, 2**53, 2**80):
        assert factor(schedule, updates) == schedule.final_factor


@given(schedules(), st.lists(st.integers(0, 2**53), min_size=2, max_size=20))
def test_each_part_goes_one_way_only(schedule: Schedule, anywhere: list[int]) -> None:
    """From the start to 1, then from 1 to the end, up to the rounding of the numbers it lies between."""
    updates = sorted({*anywhere, *range(60)})
    warm = [factor(schedule, at) for at in updates if at <= schedule.warmup_steps]
    after = [factor(schedule, at) for at in updates if at >= schedule.warmup_steps]
    assert monotone(warm, up=schedule.warmup_start_factor <= 1.0)
    end = schedule.final_factor if schedule.kind in WITH_AN_END else schedule.gamma
    assert monotone(after, up=end >= 1.0)


def monotone(values: list[float], *, up: bool) -> bool:
    slack = 1e-15 * max((1.0, *values))
    return all((b - a if up else a - b) >= -slack for a, b in zip(values, values[1:], strict=False))


def test_a_power_beyond_float64_stops_at_its_largest() -> None:
    assert factor(Schedule.exponential(2.0), 1023) == 2.0**1023
    assert factor(Schedule.exponential(2.0), 1024) == sys.float_info.max
    assert factor(Schedule.step(1, 1e300), 2) == sys.float_info.max
    assert factor(Schedule.exponential(0.5), 2000) == 0.0


def test_an_end_at_the_largest_float64_does_not_overflow() -> None:
    for schedule in (Schedule.linear(9, final_factor=sys.float_info.max), Schedule.cosine(9, final_factor=1.7e308)):
        assert all(math.isfinite(factor(schedule, updates)) for updates in range(12))


# --- against torch --------------------------------------------------------------------------------------------

LR = 0.5


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")


def learning_rates(torch: Any, make: Any, steps: int = STEPS) -> list[float]:
    """Return the learning rate of each update that a scheduler gives an optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    with warnings.catch_warnings():
        # SequentialLR still passes the epoch that its own schedulers deprecate.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
        scheduler = make(optimizer)
        rates = []
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return rates


def ours(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [LR * factor(schedule, updates) for updates in range(steps)]


KINDS: dict[str, tuple[Schedule, Any]] = {
    "linear": (
        Schedule.linear(25, final_factor=0.2),
        lambda lrs, optimizer: lrs.LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=25),
    ),
    "cosine": (
        Schedule.cosine(STEPS, final_factor=0.1),  # not past its end, where torch swings back
        lambda lrs, optimizer: lrs.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0.1 * LR),
    ),
    "step": (Schedule.step(7, 0.3), lambda lrs, optimizer: lrs.StepLR(optimizer, step_size=7, gamma=0.3)),
    "exponential": (Schedule.exponential(0.93), lambda lrs, optimizer: lrs.ExponentialLR(optimizer, gamma=0.93)),
    "polynomial": (
        Schedule.polynomial(25, 1.7),
        lambda lrs, optimizer: lrs.PolynomialLR(optimizer, total_iters=25, power=1.7),
    ),
    "warm-up": (
        Schedule.constant(10, warmup_start_factor=0.2),
        lambda lrs, optimizer: lrs.LinearLR(optimizer, start_factor=0.2, total_iters=10),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rates_are_torchs(torch: Any, kind: str) -> None:
    schedule, make = KINDS[kind]
    theirs = learning_rates(torch, lambda optimizer: make(torch.optim.lr_scheduler, optimizer))
    assert ours(schedule) == pytest.approx(theirs, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (
            Schedule.linear(33, final_factor=0.2, warmup_steps=8, warmup_start_factor=0.1),
            lambda lrs, optimizer: lrs.LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=25),
        ),
        (
            Schedule.cosine(STEPS, warmup_steps=8, warmup_start_factor=0.1),
            lambda lrs, optimizer: lrs.CosineAnnealingLR(optimizer, T_max=STEPS - 8),
        ),
        (
            Schedule.step(7, 0.3, warmup_steps=8, warmup_start_factor=0.1),
            lambda lrs, optimizer: lrs.StepLR(optimizer, step_size=7, gamma=0.3),
        ),
        (
            Schedule.exponential(0.93, warmup_steps=8, warmup_start_factor=0.1),
            lambda lrs, optimizer: lrs.ExponentialLR(optimizer, gamma=0.93),
        ),
        (
            Schedule.polynomial(33, 1.7, warmup_steps=8, warmup_start_factor=0.1),
            lambda lrs, optimizer: lrs.PolynomialLR(optimizer, total_iters=25, power=1.7),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_warmup_before_it_is_torchs_sequence(torch: Any, schedule: Schedule, after: Any) -> None:
    lrs = torch.optim.lr_scheduler

    def sequence(optimizer: Any) -> Any:
        warmup = lrs.LinearLR(optimizer, start_factor=0.1, total_iters=8)
        return lrs.SequentialLR(optimizer, [warmup, after(lrs, optimizer)], milestones=[8])

    assert ours(schedule) == pytest.approx(learning_rates(torch, sequence), rel=1e-12, abs=1e-15)


def test_one_cycle_is_torchs_with_its_phases_one_update_earlier(torch: Any) -> None:
    """Its phases end at pct_start·T − 1 and T − 1: with T = 40 and pct_start = 1/4 at 9 and 39."""

    def one_cycle(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LR, total_steps=STEPS, pct_start=0.25, cycle_momentum=False
        )

    schedule = Schedule(kind="one_cycle", warmup_steps=9, total_steps=39, warmup_start_factor=1 / 25, final_factor=4e-6)
    schedule.check()
    assert ours(schedule) == pytest.approx(learning_rates(torch, one_cycle), rel=1e-12, abs=1e-15)
    same = Schedule.one_cycle(39, rise_fraction=9 / 39)
    assert ours(same) == pytest.approx(ours(schedule), rel=1e-15)
