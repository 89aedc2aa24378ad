"""From messages to the domain's records: defaults, and what each value becomes. Refusals are in `test_bad_*.py`."""

from __future__ import annotations

import re
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from stepwire.errors import InvalidRequestError, Reason, UnsupportedFeatureError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling
from stepwire.optimizers.schedules import Schedule
from stepwire.v1 import optimizer_pb2, precision_pb2, session_pb2, tensor_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT16, FLOAT32
from stepwire.wire.messages import PRECISIONS, optimizer_to_wire
from stepwire_server.config import ServerConfig
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rpc import decode_config as decoding
from stepwire_server.rules import Precision

LIMITS = ServerConfig(max_lease_seconds=100.0, max_tensors=5)


def config(**fields: Any) -> session_pb2.SessionConfig:
    defaults: dict[str, Any] = {
        "tensors": [tensor_pb2.TensorSpec(name="w", shape=[2, 3])],
        "optimizer": optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    }
    return session_pb2.SessionConfig(**defaults | fields)


def decode(**fields: Any) -> SessionConfig:
    return decoding.decode_session_config(config(**fields), LIMITS)


def optimizer(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM, **fields)


def numbers(**fields: Any) -> optimizer_pb2.Hyperparameters:
    return optimizer_pb2.Hyperparameters(**fields)


def sgd(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_SGD, hyperparameters=numbers(**fields))


def treated(**fields: Any) -> SessionConfig:
    return decode(gradient=optimizer_pb2.GradientTreatment(**fields))


def test_a_minimal_config_takes_the_contracts_defaults() -> None:
    assert decode() == SessionConfig(
        layout=place([TensorSpec("w", (2, 3))], 1),
        optimizer=Adam(),
        groups=(Adam().hyperparameters(),),
        schedules=(None,),
        group_clips=(None,),
        treatment=GradientTreatment(non_finite="reject"),
        precision=Precision.FLOAT32,
        group_precisions=(Precision.FLOAT32,),
        measures=True,
        gradient_dtype=FLOAT32,
        reply_dtype=FLOAT32,
        start_at_zero=False,
        lease_seconds=100.0,
        label="",
    )


def test_decoupled_decay_has_a_default_of_its_own() -> None:
    assert decode(optimizer=optimizer(decoupled_weight_decay=True)).optimizer == AdamW(weight_decay=0.01)
    undecayed = optimizer(decoupled_weight_decay=True, hyperparameters=numbers(weight_decay=0.0))
    assert decode(optimizer=undecayed).optimizer == AdamW(weight_decay=0.0)


def test_every_number_of_the_optimizer_is_taken_zeros_too() -> None:
    message = optimizer(
        formula=optimizer_pb2.FORMULA_NO_BIAS_CORRECTION,
        amsgrad=optimizer_pb2.AMSGRAD_RAW,
        hyperparameters=numbers(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, maximize=True),
    )
    assert decode(optimizer=message).optimizer == Adam(
        lr=0.0,
        betas=(0.0, 0.0),
        eps=0.0,
        weight_decay=0.0,
        maximize=True,
        amsgrad=True,
        formula="no_bias_correction",
    )


def test_groups_replace_what_they_set_and_keep_the_rest() -> None:
    decoded = decode(
        optimizer=optimizer(hyperparameters=numbers(lr=0.5, eps=0.25)),
        groups=[
            optimizer_pb2.ParameterGroup(),
            optimizer_pb2.ParameterGroup(overrides=numbers(lr=0.0, maximize=True)),
        ],
    )
    base = Adam(lr=0.5, eps=0.25).hyperparameters()
    assert decoded.groups == (base, base.replace({"lr": 0.0, "maximize": True}))


def test_everything_else_is_taken_as_it_is() -> None:
    decoded = decode(
        gradient=optimizer_pb2.GradientTreatment(
            non_finite=optimizer_pb2.NON_FINITE_POLICY_SKIP,
            clip_grad_norm=1.5,
            clip_formula=optimizer_pb2.CLIP_FORMULA_KERAS,
            clip_grad_value=0.5,
            loss_scaling=optimizer_pb2.LossScaling(initial_scale=8.0, growth_interval=3),
            missing_gradient=optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP,
            parameter_average_decay=0.75,
        ),
        groups=[
            optimizer_pb2.ParameterGroup(
                schedule=optimizer_pb2.Schedule(kind=optimizer_pb2.SCHEDULE_KIND_LINEAR, total_steps=9),
                clip_grad_norm=2.5,
            ),
            optimizer_pb2.ParameterGroup(),
        ],
        tensors=[tensor_pb2.TensorSpec(name="w", shape=[2, 3], frozen=True)],
        state_precision=session_pb2.STATE_PRECISION_BFLOAT16_MOMENTS,
        telemetry=session_pb2.TELEMETRY_LEVEL_GRADIENT,
        gradient_dtype=tensor_pb2.DTYPE_BFLOAT16,
        reply_dtype=tensor_pb2.DTYPE_FLOAT16,
        initialization=session_pb2.INITIALIZATION_ZEROS,
        lease=Duration(nanos=500_000_000),
        label="l" * 128,
        device="cpu",
    )
    assert decoded.treatment == GradientTreatment(
        non_finite="skip",
        clip_grad_norm=1.5,
        clip_formula="keras",
        clip_grad_value=0.5,
        loss_scaling=LossScaling(initial_scale=8.0, growth_interval=3),
        missing_gradient="keep",
        parameter_average_decay=0.75,
    )
    assert (decoded.schedules, decoded.group_clips) == ((Schedule.linear(9), None), (2.5, None))
    assert decoded.layout.tensors[0].spec == TensorSpec("w", (2, 3), frozen=True, state_precision="bfloat16")
    assert (decoded.precision, decoded.measures) == (Precision.BFLOAT16, False)
    assert (decoded.gradient_dtype, decoded.reply_dtype) == (BFLOAT16, FLOAT16)
    assert (decoded.start_at_zero, decoded.lease_seconds, decoded.label) == (True, 0.5, "l" * 128)
    assert decoded.device == "cpu"


@pytest.mark.parametrize(
    ("lease", "seconds"),
    [(Duration(seconds=100), 100.0), (Duration(nanos=1), 1e-9), (Duration(seconds=2, nanos=250_000_000), 2.25)],
    ids=str,
)
def test_a_lease_up_to_the_longest_is_used_as_it_is(lease: Duration, seconds: float) -> None:
    assert decode(lease=lease).lease_seconds == seconds


@pytest.mark.parametrize(
    ("lease", "seconds"),
    [
        (Duration(), "0.0"),
        (Duration(seconds=-1), "-1.0"),
        (Duration(nanos=-1), "-1e-09"),
        (Duration(seconds=100, nanos=500_000_000), "100.5"),
        (Duration(seconds=2**62), repr(float(2**62))),
    ],
    ids=str,
)
def test_a_lease_of_no_time_or_too_much_is_refused(lease: Duration, seconds: str) -> None:
    """A lease that is not set is the longest; one of 0 s is a mistake."""
    with pytest.raises(InvalidRequestError, match=re.escape(f"config.lease: {seconds} s; it must be above 0")) as bad:
        decode(lease=lease)
    assert bad.value.metadata == {"field": "config.lease"}


@pytest.mark.parametrize("name", ["n" * 512, "a b", "é漢😀", "layers/0/weight", "..", "%s", "'"])
def test_names_may_hold_anything_that_is_no_control_character(name: str) -> None:
    decoded = decode(tensors=[tensor_pb2.TensorSpec(name=name, shape=[1] * 16)])
    assert decoded.layout.tensors[0].spec == TensorSpec(name, (1,) * 16)


@pytest.mark.parametrize(
    "chosen",
    [
        optimizer(amsgrad=optimizer_pb2.AMSGRAD_RAW),
        optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAGRAD),
        optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADADELTA),
    ],
    ids=["amsgrad", "adagrad", "adadelta"],
)
def test_eight_bits_are_refused_for_slots_that_they_do_not_hold(chosen: optimizer_pb2.Optimizer) -> None:
    eight = precision_pb2.STATE_PRECISION_INT8_MOMENTS
    groups = [optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(state_precision=eight)]
    tensors = [tensor_pb2.TensorSpec(name="a"), tensor_pb2.TensorSpec(name="b", state_precision=eight)]
    for field, fields in {
        "config": {"state_precision": eight},
        "config.groups[1]": {"groups": groups},
        "config.tensors[1]": {"tensors": tensors},
    }.items():
        with pytest.raises(InvalidRequestError, match="which 8 bits do not hold") as refused:
            decode(optimizer=chosen, **fields)
        assert refused.value.metadata == {"field": f"{field}.state_precision"}
        assert refused.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_difference_of_moments_needs_float32(precision: str, momentum: float) -> None:
    """In fewer bits the difference may be rounding alone, and an update g / eps."""
    chosen = optimizer_to_wire(RMSprop(centered=True, momentum=momentum))
    with pytest.raises(InvalidRequestError, match="subtracts the square of grad_avg.*use float32 moments") as refused:
        decode(optimizer=chosen, state_precision=PRECISIONS[precision])
    assert refused.value.metadata == {"field": "config.state_precision"}
    groups = [optimizer_pb2.ParameterGroup(state_precision=PRECISIONS["float32"])]
    decode(optimizer=chosen, groups=groups)


def test_a_tensor_has_its_own_precision_or_its_groups_or_the_sessions() -> None:
    float32, bfloat16, int8 = (precision_pb2.StatePrecision.values())[1:]
    decoded = decode(
        state_precision=int8,
        groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(state_precision=bfloat16)],
        tensors=[
            tensor_pb2.TensorSpec(name="a"),
            tensor_pb2.TensorSpec(name="b", state_precision=float32),
            tensor_pb2.TensorSpec(name="c", group=1),
            tensor_pb2.TensorSpec(name="d", group=1, state_precision=int8),
        ],
    )
    found = {tensor.spec.name: tensor.spec.state_precision for tensor in decoded.layout.tensors}
    assert found == {"a": "int8", "b": "float32", "c": "bfloat16", "d": "int8"}
    assert (decoded.precision, decoded.group_precisions) == (Precision.INT8, (Precision.INT8, Precision.BFLOAT16))


@pytest.mark.parametrize("owner", ["groups", "tensors"])
def test_a_precision_that_does_not_exist_is_refused_by_its_field(owner: str) -> None:
    kinds: dict[str, Any] = {"groups": optimizer_pb2.ParameterGroup(), "tensors": tensor_pb2.TensorSpec(name="w")}
    kinds[owner].state_precision = 9
    with pytest.raises(UnsupportedFeatureError, match="asks for 'state_9'") as refused:
        decode(**{name: [kind] for name, kind in kinds.items()})
    assert refused.value.metadata == {"field": f"config.{owner}.state_precision", "feature": "state_9"}


def test_options_of_other_rules_are_taken_and_have_their_published_defaults() -> None:
    message = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAGRAD, initial_accumulator_value=0.5)
    assert decode(optimizer=message).optimizer == Adagrad(initial_accumulator_value=0.5)
    nesterov = sgd(momentum=0.5)
    nesterov.nesterov = True
    assert decode(optimizer=nesterov).optimizer == SGD(momentum=0.5, nesterov=True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"clip_grad_norm": 0.0}, "config.gradient.clip_grad_norm"),
        ({"clip_grad_value": float("nan")}, "config.gradient.clip_grad_value"),
        ({"clip_formula": optimizer_pb2.CLIP_FORMULA_OPTAX}, "config.gradient.clip_formula"),
        ({"parameter_average_decay": 1.0}, "config.gradient.parameter_average_decay"),
        (
            {"loss_scaling": optimizer_pb2.LossScaling(growth_factor=0.5)},
            "config.gradient.loss_scaling.growth_factor",
        ),
        (
            {"loss_scaling": optimizer_pb2.LossScaling(), "non_finite": optimizer_pb2.NON_FINITE_POLICY_ALLOW},
            "config.gradient.non_finite",
        ),
    ],
)
def test_a_treatment_out_of_range_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        treated(**fields)
    assert (refused.value.metadata["field"], refused.value.reason) == (field, Reason.INVALID_CONFIG)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_groups_bound_out_of_range_is_refused_by_its_field(bound: float) -> None:
    groups = [optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(clip_grad_norm=bound)]
    with pytest.raises(InvalidRequestError) as refused:
        decode(groups=groups)
    assert refused.value.metadata == {"field": "config.groups[1].clip_grad_norm"}
    assert refused.value.reason is Reason.INVALID_CONFIG


def test_a_schedule_that_is_not_whole_is_refused_by_its_field() -> None:
    schedule = optimizer_pb2.Schedule(kind=optimizer_pb2.SCHEDULE_KIND_COSINE)
    with pytest.raises(InvalidRequestError) as refused:
        decode(groups=[optimizer_pb2.ParameterGroup(schedule=schedule)])
    assert refused.value.metadata == {"field": "config.groups[0].schedule.total_steps"}
    assert refused.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize("request_id", ["a", "A-b_c.9", "x" * 64])
def test_a_request_id_is_taken_as_it_is(request_id: str) -> None:
    assert decoding.decode_request_id(request_id) == request_id


@pytest.mark.parametrize("token", ["", "0123456789abcdef" * 2])
def test_a_page_token_is_taken_as_it_is(token: str) -> None:
    assert decoding.decode_page_token(token) == token
