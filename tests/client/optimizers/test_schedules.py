"""Schedule records: their refusals, and the way over the wire."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.schedules import SCHEDULE_KINDS, Schedule, ScheduleKind, schedule_from_wire, schedule_to_wire
from stepwire.v1 import optimizer_pb2

# The least that each kind can be made of.
WHOLE: dict[ScheduleKind, dict[str, Any]] = {
    "constant": {},
    "linear": {"total_steps": 10},
    "cosine": {"total_steps": 10},
    "step": {"interval_steps": 3, "gamma": 0.5},
    "exponential": {"gamma": 0.5},
    "polynomial": {"total_steps": 10, "gamma": 2.0},
    "one_cycle": {"total_steps": 10, "warmup_steps": 3},
}
OPTIONAL = {
    kind: {"warmup_steps", "warmup_start_factor"} | ({"final_factor"} if "total_steps" in fields else set())
    for kind, fields in WHOLE.items()
}
NAMES = ("warmup_steps", "total_steps", "final_factor", "gamma", "interval_steps", "warmup_start_factor")


def make(kind: ScheduleKind, **fields: Any) -> Schedule:
    return Schedule(kind=kind, **WHOLE[kind] | fields)


def refused(schedule: Schedule, name: str, *texts: str) -> None:
    """Expect a refusal that names the field by its path, and says all of this."""
    with pytest.raises(InvalidRequestError) as caught:
        schedule.check("groups[2].schedule")
    assert caught.value.metadata == {"field": f"groups[2].schedule.{name}"}
    for text in (f"groups[2].schedule.{name}: ", *texts):
        assert text in str(caught.value)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Draw any schedule that is whole."""
    kind = draw(st.sampled_from(list(SCHEDULE_KINDS)))
    least = 1 if kind == "one_cycle" else 0
    factors = st.floats(0, allow_infinity=False)
    fields: dict[str, Any] = {"warmup_steps": draw(st.integers(least, 2**53 - 2))}
    if fields["warmup_steps"]:
        fields["warmup_start_factor"] = draw(factors)
    if "total_steps" in WHOLE[kind]:
        fields["total_steps"] = draw(st.integers(fields["warmup_steps"] + 1, 2**53 - 1))
        fields["final_factor"] = draw(factors)
    if "gamma" in WHOLE[kind]:
        fields["gamma"] = draw(st.floats(0, exclude_min=True, allow_infinity=False))
    if "interval_steps" in WHOLE[kind]:
        fields["interval_steps"] = draw(st.integers(1, 2**53 - 1))
    return Schedule(kind=kind, **fields)


# --- complete schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHOLE)
def test_the_least_of_each_kind_is_enough(kind: ScheduleKind) -> None:
    make(kind).check()


@pytest.mark.parametrize(
    "extreme",
    [
        {"total_steps": 2**53 - 1, "warmup_steps": 2**53 - 2},
        {"final_factor": 3.5},
        {"warmup_steps": 9, "warmup_start_factor": 7.0},
        {"total_steps": np.int64(7), "warmup_steps": np.uint8(6), "final_factor": np.float32(0.5)},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(extreme: dict[str, Any]) -> None:
    make("linear", **extreme).check()


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear", "", None, 2, ["linear"]])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    refused(Schedule(kind=kind), "kind", f"kind is {kind!r}", "use one of: constant, linear, cosine, step,")


@pytest.mark.parametrize("name", ["warmup_steps", "total_steps", "interval_steps"])
@pytest.mark.parametrize("value", [-1, 2**53, 2**64])
def test_a_count_out_of_range_is_refused(name: str, value: int) -> None:
    kind: ScheduleKind = "step" if name == "interval_steps" else "linear"
    refused(make(kind, **{name: value}), name, f"{name} is {value}", "a whole number", "2^53")


@pytest.mark.parametrize("name", ["warmup_steps", "total_steps", "interval_steps"])
@pytest.mark.parametrize("value", [10.0, True, "10", None, math.nan])
def test_a_count_that_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    kind: ScheduleKind = "step" if name == "interval_steps" else "linear"
    refused(make(kind, **{name: value}), name, f"{value!r} is not a whole number")


@pytest.mark.parametrize(
    ("kind", "name", "allowed"),
    [
        ("linear", "final_factor", "finite and >= 0"),
        ("step", "gamma", "finite and > 0"),
        ("exponential", "gamma", "finite and > 0"),
        ("polynomial", "gamma", "finite and > 0"),
        ("one_cycle", "warmup_start_factor", "finite and >= 0"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_a_factor_out_of_range_is_refused(kind: ScheduleKind, name: str, allowed: str, value: float) -> None:
    refused(make(kind, **{name: value}), name, f"{name} is {value!r}; it must be {allowed}")


@pytest.mark.parametrize("name", ["final_factor", "gamma", "warmup_start_factor"])
@pytest.mark.parametrize("value", [True, "0.5", b"1", None, 1j, 10**400])
def test_a_factor_that_is_no_number_is_refused(name: str, value: Any) -> None:
    refused(make("polynomial", warmup_steps=2, **{name: value}), name, "not a number that a float can represent")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in WHOLE.items() for name in fields])
def test_what_a_kind_needs_is_asked_for(kind: ScheduleKind, name: str) -> None:
    refused(make(kind, **{name: 0}), name, f"{name} is 0, or not set; kind {kind!r} needs ")


UNUSED = [(kind, name) for kind in WHOLE for name in NAMES if name not in {*WHOLE[kind], *OPTIONAL[kind]}]


@pytest.mark.parametrize(("kind", "name"), UNUSED)
def test_what_a_kind_does_not_use_is_refused(kind: ScheduleKind, name: str) -> None:
    value = 20 if name.endswith("_steps") else 0.25
    refused(make(kind, **{name: value}), name, f"{name} is {value}; kind {kind!r} does not use it", "used by: ")


def test_every_unused_field_is_known() -> None:
    assert len(UNUSED) == 4 + 2 + 2 + 2 + 3 + 1 + 2  # in the order of the kinds


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "one_cycle"])
@pytest.mark.parametrize("warmup_steps", [10, 11])
def test_an_end_within_the_warmup_is_refused(kind: ScheduleKind, warmup_steps: int) -> None:
    schedule = make(kind, warmup_steps=warmup_steps)
    refused(schedule, "total_steps", f"total_steps is 10; it must be > warmup_steps, which is {warmup_steps}")


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "one_cycle"])
def test_a_start_factor_without_warmup_is_refused(kind: ScheduleKind) -> None:
    refused(make(kind, warmup_start_factor=0.1), "warmup_start_factor", "is 0.1, but warmup_steps is 0")


# --- constructors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Schedule.constant(), Schedule(kind="constant")),
        (Schedule.constant(5), Schedule(kind="constant", warmup_steps=5)),
        (Schedule.linear(9), Schedule(kind="linear", total_steps=9)),
        (
            Schedule.linear(9, final_factor=0.5, warmup_steps=2, warmup_start_factor=0.25),
            Schedule(kind="linear", total_steps=9, final_factor=0.5, warmup_steps=2, warmup_start_factor=0.25),
        ),
        (
            Schedule.cosine(9, warmup_steps=2, final_factor=0.1),
            Schedule(kind="cosine", total_steps=9, warmup_steps=2, final_factor=0.1),
        ),
        (
            Schedule.step(3, 0.1, warmup_steps=2),
            Schedule(kind="step", interval_steps=3, gamma=0.1, warmup_steps=2),
        ),
        (
            Schedule.exponential(0.9, warmup_steps=2, warmup_start_factor=0.5),
            Schedule(kind="exponential", gamma=0.9, warmup_steps=2, warmup_start_factor=0.5),
        ),
        (
            Schedule.polynomial(9, 2.0, final_factor=0.1),
            Schedule(kind="polynomial", total_steps=9, gamma=2.0, final_factor=0.1),
        ),
        (
            Schedule.one_cycle(100),
            Schedule(kind="one_cycle", warmup_steps=30, total_steps=100, warmup_start_factor=0.04, final_factor=4e-6),
        ),
        (
            Schedule.one_cycle(3, rise_fraction=0.1, initial_factor=0.5, final_factor=0.0),
            Schedule(kind="one_cycle", warmup_steps=1, total_steps=3, warmup_start_factor=0.5),
        ),
        (
            Schedule.one_cycle(3, rise_fraction=0.99, initial_factor=0.0, final_factor=0.0),
            Schedule(kind="one_cycle", warmup_steps=2, total_steps=3),
        ),
    ],
)
def test_constructors_make_these(made: Schedule, expected: Schedule) -> None:
    assert made == expected


@pytest.mark.parametrize(
    ("make_it", "field"),
    [
        (lambda: Schedule.constant(-1), "warmup_steps"),
        (lambda: Schedule.constant(0, warmup_start_factor=0.5), "warmup_start_factor"),
        (lambda: Schedule.linear(0), "total_steps"),
        (lambda: Schedule.cosine(9, warmup_steps=9), "total_steps"),
        (lambda: Schedule.step(0, 0.5), "interval_steps"),
        (lambda: Schedule.exponential(0.0), "gamma"),
        (lambda: Schedule.polynomial(9, -2.0), "gamma"),
        (lambda: Schedule.one_cycle(1), "total_steps"),
        (lambda: Schedule.one_cycle(10**400), "total_steps"),
        (lambda: Schedule.one_cycle(9.0), "total_steps"),  # type: ignore[arg-type]
        (lambda: Schedule.one_cycle(9, rise_fraction=0.0), "rise_fraction"),
        (lambda: Schedule.one_cycle(9, rise_fraction=1.0), "rise_fraction"),
        (lambda: Schedule.one_cycle(9, rise_fraction=math.nan), "rise_fraction"),
        (lambda: Schedule.one_cycle(9, initial_factor=-1.0), "warmup_start_factor"),
        (lambda: Schedule.one_cycle(9, final_factor=math.inf), "final_factor"),
    ],
)
def test_constructors_refuse_at_once(make_it: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_it()
    assert caught.value.metadata == {"field": f"schedule.{field}"}


# --- the wire -------------------------------------------------------------------------------------------------


def test_every_kind_of_the_contract_has_a_name() -> None:
    assert {optimizer_pb2.SCHEDULE_KIND_UNSPECIFIED, *SCHEDULE_KINDS.values()} == set(
        optimizer_pb2.ScheduleKind.values()
    )


def test_the_record_mirrors_the_message() -> None:
    assert list(Schedule.__dataclass_fields__) == [field.name for field in optimizer_pb2.Schedule.DESCRIPTOR.fields]


@given(schedules())
def test_a_schedule_goes_both_ways(schedule: Schedule) -> None:
    schedule.check()
    sent = schedule_to_wire(schedule).SerializeToString()
    assert schedule_from_wire(optimizer_pb2.Schedule.FromString(sent), "f") == schedule


def test_numpys_numbers_travel() -> None:
    schedule = Schedule.polynomial(np.int64(9), np.float32(2.0), final_factor=np.float64(0.5))  # type: ignore[arg-type]
    assert schedule_from_wire(schedule_to_wire(schedule), "f") == Schedule.polynomial(9, 2.0, final_factor=0.5)


@pytest.mark.parametrize(
    ("message", "field", "text"),
    [
        (optimizer_pb2.Schedule(), "kind", "kind is missing; use one of: constant,"),
        (optimizer_pb2.Schedule(kind=99), "kind", "99 is unknown; use one of: constant,"),  # type: ignore[arg-type]
        (optimizer_pb2.Schedule(kind=2), "total_steps", "kind 'linear' needs a whole number"),
        (optimizer_pb2.Schedule(kind=1, warmup_steps=2**53), "warmup_steps", f"warmup_steps is {2**53}"),
        (optimizer_pb2.Schedule(kind=5, gamma=math.nan), "gamma", "gamma is nan"),
        (optimizer_pb2.Schedule(kind=5, gamma=0.5, total_steps=9), "total_steps", "does not use it"),
        (optimizer_pb2.Schedule(kind=7, total_steps=9), "warmup_steps", "'one_cycle' needs a whole number"),
    ],
)
def test_a_wrong_message_is_refused_under_its_path(message: optimizer_pb2.Schedule, field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        schedule_from_wire(message, "config.groups[1].schedule")
    assert caught.value.metadata == {"field": f"config.groups[1].schedule.{field}"}
    assert f"config.groups[1].schedule.{field}: " in str(caught.value)
    assert text in str(caught.value)
