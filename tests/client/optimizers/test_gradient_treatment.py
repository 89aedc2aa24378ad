"""The treatment of gradients: every range and every contradiction, by its field, and the way over the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.gradient_treatment import (
    GradientTreatment,
    LossScaling,
    treatment_from_wire,
    treatment_to_wire,
)
from stepwire.v1 import optimizer_pb2

NAN, INF = float("nan"), float("inf")


def refused(treatment: GradientTreatment, *, group_clips: bool = False) -> tuple[str, str]:
    """Return the field and the text, which begins with it."""
    with pytest.raises(InvalidRequestError) as error:
        treatment.check("here", group_clips=group_clips)
    field = error.value.metadata["field"]
    assert str(error.value).startswith(f"{field}: ")
    return field, str(error.value)


def test_the_defaults_are_fine_and_reject_what_is_not_finite() -> None:
    GradientTreatment().check("here")
    assert GradientTreatment().policy == "reject"


WRONG: dict[str, list[tuple[Any, str]]] = {
    "non_finite": [("ignore", "use one of: reject, skip, allow"), (1, "1"), ("", "''")],
    "clip_grad_norm": [
        (0.0, "finite and > 0"),
        (-1.0, "-1.0"),
        (INF, "inf"),
        (NAN, "nan"),
        ("1", "'1'"),
        (True, "True"),
        (10**400, "not a number that a float can represent"),
    ],
    "clip_grad_value": [(0.0, "finite and > 0"), (-0.5, "-0.5"), (INF, "inf"), (NAN, "nan"), ([1.0], "[1.0]")],
    "clip_formula": [("tf", "use one of: torch, optax, keras"), (2, "2")],
    "accumulation_steps": [
        (0, "an integer in [1, 2^32)"),
        (-1, "-1"),
        (2**32, str(2**32)),
        (1.0, "1.0"),
        (True, "True"),
        (None, "None"),
    ],
    "missing_gradient": [("zero", "use one of: reject, keep"), (None, "None")],
    "parameter_average_decay": [(0.0, "in (0, 1)"), (1.0, "1.0"), (NAN, "nan"), (-0.1, "-0.1"), ("0.9", "'0.9'")],
}


@pytest.mark.parametrize(("name", "value", "text"), [(name, *case) for name, cases in WRONG.items() for case in cases])
def test_a_value_out_of_range_is_refused_by_its_field(name: str, value: Any, text: str) -> None:
    field, message = refused(GradientTreatment(**{name: value}))
    assert field == f"here.{name}"
    assert text in message


WRONG_SCALING: dict[str, list[tuple[Any, str]]] = {
    "initial_scale": [
        (0.0, "in [1e-37, 1e37]"),
        (1e38, "1e+38"),
        (1e-38, "1e-38"),
        (-1.0, "-1.0"),
        (INF, "inf"),
        (NAN, "nan"),
    ],
    "growth_factor": [(1.0, "finite and > 1"), (0.5, "0.5"), (INF, "inf"), (NAN, "nan")],
    "backoff_factor": [(0.0, "in (0, 1)"), (1.0, "1.0"), (NAN, "nan"), (2.0, "2.0")],
    "growth_interval": [(0, "an integer in [1, 2^32)"), (2**32, str(2**32)), (1.5, "1.5"), (False, "False")],
}


@pytest.mark.parametrize(
    ("name", "value", "text"), [(name, *case) for name, cases in WRONG_SCALING.items() for case in cases]
)
def test_a_loss_scaling_out_of_range_is_refused_by_its_field(name: str, value: Any, text: str) -> None:
    field, message = refused(GradientTreatment(loss_scaling=LossScaling(**{name: value})))
    assert field == f"here.loss_scaling.{name}"
    assert text in message


@pytest.mark.parametrize("value", [1024.0, {"initial_scale": 1.0}, "dynamic", True])
def test_a_loss_scaling_is_a_record(value: Any) -> None:
    assert refused(GradientTreatment(loss_scaling=value))[0] == "here.loss_scaling"


@pytest.mark.parametrize(
    "fields",
    [
        {"clip_grad_norm": 1e-300, "clip_grad_value": 1e300},
        {"clip_grad_norm": np.float32(0.5), "clip_formula": "keras"},
        {"accumulation_steps": 2**32 - 1, "parameter_average_decay": 0.9999},
        {"loss_scaling": LossScaling(growth_factor=1.001, backoff_factor=0.999, growth_interval=1)},
        {"missing_gradient": "keep", "non_finite": "allow"},
    ],
)
def test_values_within_the_ranges_are_accepted(fields: dict[str, Any]) -> None:
    GradientTreatment(**fields).check("here")


@pytest.mark.parametrize("formula", ["torch", "optax", "keras"])
def test_a_formula_without_anything_to_clip_by_is_a_contradiction(formula: Any) -> None:
    field, text = refused(GradientTreatment(clip_formula=formula, clip_grad_value=1.0))
    assert field == "here.clip_formula"
    assert "without clip_grad_norm clips nothing" in text
    GradientTreatment(clip_formula=formula).check("here", group_clips=True)
    GradientTreatment(clip_formula=formula, clip_grad_norm=1.0).check("here")


@pytest.mark.parametrize("policy", ["reject", "allow"])
def test_loss_scaling_skips_and_nothing_else(policy: Any) -> None:
    field, text = refused(GradientTreatment(loss_scaling=LossScaling(), non_finite=policy))
    assert field == "here.non_finite"
    assert "contradicts loss_scaling" in text
    for said in (None, "skip"):
        treatment = GradientTreatment(loss_scaling=LossScaling(), non_finite=said)  # type: ignore[arg-type]
        treatment.check("here")
        assert treatment.policy == "skip"


WHOLE = GradientTreatment(
    non_finite="skip",
    clip_grad_norm=1.5,
    clip_formula="optax",
    clip_grad_value=0.25,
    accumulation_steps=7,
    loss_scaling=LossScaling(initial_scale=8.0, growth_factor=4.0, backoff_factor=0.125, growth_interval=9),
    parameter_average_decay=0.75,
)


@pytest.mark.parametrize(
    "treatment",
    [
        WHOLE,
        GradientTreatment(non_finite="reject"),
        GradientTreatment(non_finite="allow", missing_gradient="keep"),
        GradientTreatment(non_finite="reject", clip_grad_norm=2.0, clip_formula="torch"),
    ],
)
def test_a_treatment_goes_both_ways(treatment: GradientTreatment) -> None:
    assert treatment_from_wire(treatment_to_wire(treatment), "here", group_clips=False) == treatment


def test_what_is_unset_on_the_wire_has_its_default_filled_in() -> None:
    empty = optimizer_pb2.GradientTreatment()
    assert treatment_from_wire(empty, "here", group_clips=False) == GradientTreatment(non_finite="reject")
    assert treatment_from_wire(empty, "here", group_clips=True) == GradientTreatment(
        non_finite="reject", clip_formula="torch"
    )
    scaled = optimizer_pb2.GradientTreatment(loss_scaling=optimizer_pb2.LossScaling(), clip_grad_norm=1.0)
    assert treatment_from_wire(scaled, "here", group_clips=False) == GradientTreatment(
        non_finite="skip", loss_scaling=LossScaling(), clip_grad_norm=1.0, clip_formula="torch"
    )


@pytest.mark.parametrize("name", ["non_finite", "clip_formula", "missing_gradient"])
def test_an_unknown_choice_on_the_wire_is_refused_with_its_value(name: str) -> None:
    message = optimizer_pb2.GradientTreatment(**{name: 77})
    with pytest.raises(InvalidRequestError, match="77 is unknown") as error:
        treatment_from_wire(message, "config.gradient", group_clips=False)
    assert error.value.metadata == {"field": f"config.gradient.{name}"}


def test_a_value_out_of_range_on_the_wire_is_refused_by_its_field() -> None:
    for message, name in (
        (optimizer_pb2.GradientTreatment(clip_grad_norm=0.0), "clip_grad_norm"),
        (optimizer_pb2.GradientTreatment(clip_grad_value=NAN), "clip_grad_value"),
        (optimizer_pb2.GradientTreatment(parameter_average_decay=0.0), "parameter_average_decay"),
        (
            optimizer_pb2.GradientTreatment(loss_scaling=optimizer_pb2.LossScaling(backoff_factor=1.0)),
            "loss_scaling.backoff_factor",
        ),
    ):
        with pytest.raises(InvalidRequestError) as error:
            treatment_from_wire(message, "config.gradient", group_clips=False)
        assert error.value.metadata == {"field": f"config.gradient.{name}"}


def test_in_two_phases_the_bounds_of_norms_are_kept_for_the_coordinator() -> None:
    treatment = GradientTreatment(two_phase=True, clip_grad_norm=2.0, clip_formula="optax", non_finite="skip")
    treatment.check("", group_clips=True)
    assert treatment_from_wire(treatment_to_wire(treatment), "gradient", group_clips=True) == treatment
