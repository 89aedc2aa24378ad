"""From messages to the domain's records: defaults, and what each value becomes. Refusals are in `test_bad_*.py`."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire.codecs import BFLOAT16, FLOAT16, FLOAT32
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import SGD, Adagrad, Adam, AdamW
from stepwire.schedules import Schedule
from stepwire.treatment import GradientTreatment, LossScaling
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire_server import decoding
from stepwire_server.config import ServerConfig
from stepwire_server.plan import SessionPlan, StepOrder
from stepwire_server.rules import Precision

LIMITS = ServerConfig(max_lease_seconds=100.0, max_tensors=5)


def config(**fields: Any) -> session_pb2.SessionConfig:
    defaults: dict[str, Any] = {
        "tensors": [tensor_pb2.TensorSpec(name="w", shape=[2, 3])],
        "optimizer": optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    }
    return session_pb2.SessionConfig(**defaults | fields)


def plan(**fields: Any) -> SessionPlan:
    return decoding.decode_plan(config(**fields), LIMITS)


def optimizer(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM, **fields)


def numbers(**fields: Any) -> optimizer_pb2.Hyperparameters:
    return optimizer_pb2.Hyperparameters(**fields)


def test_a_minimal_config_takes_the_contracts_defaults() -> None:
    assert plan() == SessionPlan(
        layout=place([TensorSpec("w", (2, 3))], 1),
        optimizer=Adam(),
        groups=(Adam().hyperparameters(),),
        schedules=(None,),
        group_clips=(None,),
        treatment=GradientTreatment(non_finite="reject"),
        precision=Precision.FLOAT32,
        measures=True,
        gradient_dtype=FLOAT32,
        reply_dtype=FLOAT32,
        start_at_zero=False,
        lease_seconds=100.0,
        label="",
    )


def test_decoupled_decay_has_a_default_of_its_own() -> None:
    assert plan(optimizer=optimizer(decoupled_weight_decay=True)).optimizer == AdamW(weight_decay=0.01)
    undecayed = optimizer(decoupled_weight_decay=True, hyperparameters=numbers(weight_decay=0.0))
    assert plan(optimizer=undecayed).optimizer == AdamW(weight_decay=0.0)


def test_every_number_of_the_optimizer_is_taken_zeros_too() -> None:
    message = optimizer(
        formula=optimizer_pb2.FORMULA_NO_BIAS_CORRECTION,
        amsgrad=optimizer_pb2.AMSGRAD_RAW,
        hyperparameters=numbers(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, maximize=True),
    )
    assert plan(optimizer=message).optimizer == Adam(
        lr=0.0,
        betas=(0.0, 0.0),
        eps=0.0,
        weight_decay=0.0,
        maximize=True,
        amsgrad=True,
        formula="no_bias_correction",
    )


def test_groups_replace_what_they_set_and_keep_the_rest() -> None:
    decoded = plan(
        optimizer=optimizer(hyperparameters=numbers(lr=0.5, eps=0.25)),
        groups=[
            optimizer_pb2.ParameterGroup(),
            optimizer_pb2.ParameterGroup(overrides=numbers(lr=0.0, maximize=True)),
        ],
    )
    base = Adam(lr=0.5, eps=0.25).hyperparameters()
    assert decoded.groups == (base, base.replace({"lr": 0.0, "maximize": True}))


def test_everything_else_is_taken_as_it_is() -> None:
    decoded = plan(
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
        lease_seconds=0.5,
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
    assert decoded.layout.tensors[0].spec == TensorSpec("w", (2, 3), frozen=True)
    assert (decoded.precision, decoded.measures) == (Precision.BFLOAT16, False)
    assert (decoded.gradient_dtype, decoded.reply_dtype) == (BFLOAT16, FLOAT16)
    assert (decoded.start_at_zero, decoded.lease_seconds, decoded.label) == (True, 0.5, "l" * 128)
    assert decoded.device == "cpu"


@pytest.mark.parametrize("lease", [100.0, 1e-9])
def test_a_lease_up_to_the_longest_is_taken(lease: float) -> None:
    assert plan(lease_seconds=lease).lease_seconds == lease


@pytest.mark.parametrize("name", ["n" * 512, "a b", "é漢😀", "layers/0/weight", "..", "%s", "'"])
def test_names_may_hold_anything_that_is_no_control_character(name: str) -> None:
    decoded = plan(tensors=[tensor_pb2.TensorSpec(name=name, shape=[1] * 16)])
    assert decoded.layout.tensors[0].spec == TensorSpec(name, (1,) * 16)


ORDER_PLAN = plan(
    gradient_dtype=tensor_pb2.DTYPE_BFLOAT16,
    reply_dtype=tensor_pb2.DTYPE_FLOAT16,
    groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(overrides=numbers(lr=0.5))],
)


def order(**fields: Any) -> StepOrder:
    return decoding.decode_order(step_pb2.StepBegin(**fields), ORDER_PLAN, 1 << 20)


def test_a_minimal_step_takes_the_sessions_defaults() -> None:
    assert order(step=7, epoch=3) == StepOrder(
        7, 3, BFLOAT16, FLOAT16, True, 1 << 19, ORDER_PLAN.groups, (False, False), 1.0, frozenset()
    )


def test_a_step_may_choose_encodings_and_the_size_of_the_answers_chunks() -> None:
    decoded = order(step=1, gradient_dtype=3, reply_dtype=1, reply_chunk_bytes=4096)
    assert (decoded.gradient_dtype, decoded.reply_dtype, decoded.reply_elements) == (FLOAT16, FLOAT32, 1024)


@pytest.mark.parametrize(("mode", "wanted"), [(0, True), (1, True), (2, False)])
def test_an_answer_is_wanted_unless_it_is_not(mode: int, wanted: bool) -> None:
    assert order(step=1, reply_mode=mode).reply is wanted


def test_one_entry_of_numbers_is_for_all_groups_and_several_are_one_each() -> None:
    first, second = ORDER_PLAN.groups
    assert order(hyperparameters=[numbers(eps=0.5)]).groups == (
        first.replace({"eps": 0.5}),
        second.replace({"eps": 0.5}),
    )
    assert order(hyperparameters=[numbers(), numbers(lr=0.0)]).groups == (first, second.replace({"lr": 0.0}))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], (False, False)),
        ([numbers(lr=0.0)], (True, True)),
        ([numbers(eps=0.5)], (False, False)),
        ([numbers(), numbers(lr=0.25)], (False, True)),
    ],
)
def test_an_order_knows_which_learning_rates_it_brought(messages: Any, expected: tuple[bool, bool]) -> None:
    """Even one of 0, and one that is the group's own: it overrides the schedule's."""
    assert order(hyperparameters=messages).own_lr == expected


def treated(**fields: Any) -> SessionPlan:
    tensors = [tensor_pb2.TensorSpec(name=name, shape=[2]) for name in "abc"]
    return plan(tensors=tensors, gradient=optimizer_pb2.GradientTreatment(**fields))


def refused_field(begin: step_pb2.StepBegin, of: SessionPlan) -> tuple[str, Reason]:
    with pytest.raises(InvalidRequestError) as refused:
        decoding.decode_order(begin, of, 1 << 20)
    return refused.value.metadata["field"], refused.value.reason


@pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-37, 1e37])
def test_the_clients_loss_scale_is_taken_as_it_is(scale: float) -> None:
    assert order(step=1, loss_scale=scale).loss_scale == scale


@pytest.mark.parametrize("scale", [0.0, -1.0, 9e-38, 1.1e37, float("inf"), float("nan")])
def test_a_loss_scale_that_float32_cannot_undo_is_refused(scale: float) -> None:
    begin = step_pb2.StepBegin(step=1, loss_scale=scale)
    assert refused_field(begin, ORDER_PLAN) == ("begin.loss_scale", Reason.INVALID_CONFIG)


def test_a_session_that_scales_by_itself_refuses_a_loss_scale() -> None:
    scaling = treated(loss_scaling=optimizer_pb2.LossScaling())
    assert scaling.treatment.loss_scaling == LossScaling()
    begin = step_pb2.StepBegin(step=1, loss_scale=1.0)
    assert refused_field(begin, scaling) == ("begin.loss_scale", Reason.INVALID_CONFIG)


KEEP = optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP


@pytest.mark.parametrize("missing", [[], [0], [1, 2], [0, 1, 2]])
def test_tensors_may_be_left_out_where_the_session_keeps_them(missing: list[int]) -> None:
    begin = step_pb2.StepBegin(step=1, missing_tensors=missing)
    assert decoding.decode_order(begin, treated(missing_gradient=KEEP), 1 << 20).missing == frozenset(missing)


@pytest.mark.parametrize("missing", [[3], [1, 0], [1, 1], [0, 2**32 - 1]])
def test_missing_tensors_that_do_not_rise_or_do_not_exist_are_refused(missing: list[int]) -> None:
    begin = step_pb2.StepBegin(step=1, missing_tensors=missing)
    expected = ("begin.missing_tensors", Reason.INVALID_CONFIG)
    assert refused_field(begin, treated(missing_gradient=KEEP)) == expected


def test_no_tensor_may_be_left_out_where_the_session_rejects_that() -> None:
    begin = step_pb2.StepBegin(step=1, missing_tensors=[0])
    assert refused_field(begin, treated()) == ("begin.missing_tensors", Reason.INVALID_CONFIG)


def sgd(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_SGD, hyperparameters=numbers(**fields))


def test_momentum_is_refused_where_no_buffer_is_kept_for_it() -> None:
    begin = step_pb2.StepBegin(step=1, hyperparameters=[numbers(momentum=0.5)])
    plain, kept = plan(optimizer=sgd()), plan(optimizer=sgd(momentum=0.9))
    assert refused_field(begin, plain) == ("begin.hyperparameters[0].momentum", Reason.INVALID_CONFIG)
    assert decoding.decode_order(begin, kept, 1 << 20).groups == (SGD(momentum=0.5).hyperparameters(),)


def test_the_answers_chunks_are_cut_where_blocks_begin() -> None:
    blocks = plan(
        tensors=[tensor_pb2.TensorSpec(name="w", shape=[9000])],
        state_precision=session_pb2.STATE_PRECISION_INT8_MOMENTS,
    )
    assert blocks.layout.chunk_alignment == 256
    begin = step_pb2.StepBegin(step=1, reply_chunk_bytes=5000)
    assert decoding.decode_order(begin, blocks, 1 << 20).reply_elements == 1024


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
    with pytest.raises(InvalidRequestError, match="which 8 bits do not hold") as refused:
        plan(optimizer=chosen, state_precision=session_pb2.STATE_PRECISION_INT8_MOMENTS)
    assert refused.value.metadata == {"field": "config.state_precision"}
    assert refused.value.reason is Reason.INVALID_CONFIG


def test_options_of_other_rules_are_taken_and_have_their_published_defaults() -> None:
    message = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAGRAD, initial_accumulator_value=0.5)
    assert plan(optimizer=message).optimizer == Adagrad(initial_accumulator_value=0.5)
    nesterov = sgd(momentum=0.5)
    nesterov.nesterov = True
    assert plan(optimizer=nesterov).optimizer == SGD(momentum=0.5, nesterov=True)


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
        plan(groups=groups)
    assert refused.value.metadata == {"field": "config.groups[1].clip_grad_norm"}
    assert refused.value.reason is Reason.INVALID_CONFIG


def test_a_schedule_that_is_not_whole_is_refused_by_its_field() -> None:
    schedule = optimizer_pb2.Schedule(kind=optimizer_pb2.SCHEDULE_KIND_COSINE)
    with pytest.raises(InvalidRequestError) as refused:
        plan(groups=[optimizer_pb2.ParameterGroup(schedule=schedule)])
    assert refused.value.metadata == {"field": "config.groups[0].schedule.total_steps"}
    assert refused.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(("asked", "expected"), [(0, 65536), (4096, 4096), (65536, 65536), (4099, 4099)])
def test_chunks_are_as_large_as_asked_or_allowed(asked: int, expected: int) -> None:
    assert decoding.decode_chunk_bytes(asked, 65536, "f") == expected


@pytest.mark.parametrize("asked", [1, 4095, 65537, 2**64 - 1])
def test_chunks_out_of_range_are_refused(asked: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"f: {asked} bytes; it must be in \[4096, 65536\]"):
        decoding.decode_chunk_bytes(asked, 65536, "f")


@pytest.mark.parametrize("request_id", ["a", "A-b_c.9", "x" * 64])
def test_a_request_id_is_taken_as_it_is(request_id: str) -> None:
    assert decoding.decode_request_id(request_id) == request_id


@pytest.mark.parametrize("token", ["", "0123456789abcdef" * 2])
def test_a_page_token_is_taken_as_it_is(token: str) -> None:
    assert decoding.decode_page_token(token) == token
