"""From a step's messages to its request: defaults, the meaning of each value, and contradictions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError, Reason
from stepwire.optimizers import SGD
from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT16, FLOAT32
from stepwire_server.config import ServerConfig
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.rpc.decode_step import decode_chunk_bytes, decode_decision, decode_step_request, decode_trace


def decoded_config(**fields: Any) -> SessionConfig:
    defaults: dict[str, Any] = {
        "tensors": [tensor_pb2.TensorSpec(name="w", shape=[2, 3])],
        "optimizer": optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    }
    return decode_session_config(session_pb2.SessionConfig(**defaults | fields), ServerConfig())


def numbers(**fields: Any) -> optimizer_pb2.Hyperparameters:
    return optimizer_pb2.Hyperparameters(**fields)


CONFIG = decoded_config(
    gradient_dtype=tensor_pb2.DTYPE_BFLOAT16,
    reply_dtype=tensor_pb2.DTYPE_FLOAT16,
    groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup(overrides=numbers(lr=0.5))],
)


def request(**fields: Any) -> StepRequest:
    return decode_step_request(step_pb2.StepBegin(**fields), CONFIG, 1 << 20)


def test_a_minimal_step_has_the_sessions_defaults() -> None:
    assert request(step=7, epoch=3) == StepRequest(
        7, 3, BFLOAT16, FLOAT16, True, 1 << 19, CONFIG.groups, (False, False), None, 1.0, frozenset()
    )


def test_a_step_may_choose_encodings_and_the_size_of_the_replys_chunks() -> None:
    decoded = request(step=1, gradient_dtype=3, reply={"dtype": 1, "chunk_bytes": 4096})
    assert (decoded.gradient_dtype, decoded.reply_dtype, decoded.reply_elements) == (FLOAT16, FLOAT32, 1024)


@pytest.mark.parametrize(("mode", "wanted"), [(0, True), (1, True), (2, False)])
def test_a_reply_is_wanted_unless_it_is_not(mode: int, wanted: bool) -> None:
    assert request(step=1, reply={"mode": mode}).reply is wanted


@pytest.mark.parametrize("load", [0, 7, 2**64 - 1])
def test_a_step_names_the_load_of_its_state_or_none(load: int) -> None:
    """0 is the state before the first load, and not the absence of a number."""
    assert request(step=1, load=load).load == load
    assert request(step=1).load is None


def test_the_trace_context_of_a_step_is_cut_out_of_its_opening() -> None:
    begin = step_pb2.StepBegin(step=1, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert decode_trace(begin) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)
    assert begin == step_pb2.StepBegin(step=1)
    assert decode_trace(begin) is None


@pytest.mark.parametrize(
    ("fields", "field"), [({"base_step": 0}, "base_step"), ({"base_step": 3}, "base_step"), ({"weight": 0.5}, "weight")]
)
def test_a_field_of_several_workers_is_refused_with_one(fields: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        request(step=1, **fields)
    assert refused.value.metadata == {"field": f"begin.{field}"}


def test_one_entry_of_numbers_is_for_all_groups_and_several_are_one_each() -> None:
    first, second = CONFIG.groups
    assert request(hyperparameters=[numbers(eps=0.5)]).groups == (
        first.replace({"eps": 0.5}),
        second.replace({"eps": 0.5}),
    )
    assert request(hyperparameters=[numbers(), numbers(lr=0.0)]).groups == (first, second.replace({"lr": 0.0}))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], (False, False)),
        ([numbers(lr=0.0)], (True, True)),
        ([numbers(eps=0.5)], (False, False)),
        ([numbers(), numbers(lr=0.25)], (False, True)),
    ],
)
def test_a_request_knows_the_learning_rates_that_it_brought(messages: Any, expected: tuple[bool, bool]) -> None:
    """Even one of 0, and one that is the group's own: it overrides the schedule's."""
    assert request(hyperparameters=messages).own_lr == expected


def treated(**fields: Any) -> SessionConfig:
    tensors = [tensor_pb2.TensorSpec(name=name, shape=[2]) for name in "abc"]
    return decoded_config(tensors=tensors, gradient=optimizer_pb2.GradientTreatment(**fields))


def refused_field(begin: step_pb2.StepBegin, of: SessionConfig) -> tuple[str, Reason]:
    with pytest.raises(InvalidRequestError) as refused:
        decode_step_request(begin, of, 1 << 20)
    return refused.value.metadata["field"], refused.value.reason


@pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-37, 1e37])
def test_the_clients_loss_scale_is_used_as_it_is(scale: float) -> None:
    assert request(step=1, loss_scale=scale).loss_scale == scale


@pytest.mark.parametrize("scale", [0.0, -1.0, 9e-38, 1.1e37, float("inf"), float("nan")])
def test_a_loss_scale_that_float32_cannot_undo_is_refused(scale: float) -> None:
    begin = step_pb2.StepBegin(step=1, loss_scale=scale)
    assert refused_field(begin, CONFIG) == ("begin.loss_scale", Reason.INVALID_CONFIG)


def test_a_session_that_scales_by_itself_refuses_a_loss_scale() -> None:
    scaling = treated(loss_scaling=optimizer_pb2.LossScaling())
    assert scaling.treatment.loss_scaling == LossScaling()
    begin = step_pb2.StepBegin(step=1, loss_scale=1.0)
    assert refused_field(begin, scaling) == ("begin.loss_scale", Reason.INVALID_CONFIG)


KEEP = optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP


@pytest.mark.parametrize("missing", [[], [0], [1, 2], [0, 1, 2]])
def test_tensors_may_be_left_out_where_the_session_keeps_them(missing: list[int]) -> None:
    begin = step_pb2.StepBegin(step=1, missing_tensors=missing)
    assert decode_step_request(begin, treated(missing_gradient=KEEP), 1 << 20).missing == frozenset(missing)


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
    plain, kept = decoded_config(optimizer=sgd()), decoded_config(optimizer=sgd(momentum=0.9))
    assert refused_field(begin, plain) == ("begin.hyperparameters[0].momentum", Reason.INVALID_CONFIG)
    assert decode_step_request(begin, kept, 1 << 20).groups == (SGD(momentum=0.5).hyperparameters(),)


def test_the_replys_chunks_are_cut_where_blocks_begin() -> None:
    blocks = decoded_config(
        tensors=[tensor_pb2.TensorSpec(name="w", shape=[9000])],
        state_precision=session_pb2.STATE_PRECISION_INT8_MOMENTS,
    )
    assert blocks.layout.chunk_alignment == 256
    begin = step_pb2.StepBegin(step=1, reply={"chunk_bytes": 5000})
    assert decode_step_request(begin, blocks, 1 << 20).reply_elements == 1024


@pytest.mark.parametrize(("asked", "expected"), [(0, 65536), (4096, 4096), (65536, 65536), (4099, 4099)])
def test_chunks_are_as_large_as_asked_or_allowed(asked: int, expected: int) -> None:
    assert decode_chunk_bytes(asked, 65536, "f") == expected


@pytest.mark.parametrize("asked", [1, 4095, 65537, 2**64 - 1])
def test_chunks_out_of_range_are_refused(asked: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"f: {asked} bytes; it must be in \[4096, 65536\]"):
        decode_chunk_bytes(asked, 65536, "f")


def test_the_order_of_a_reply_is_indices_that_differ() -> None:
    three = treated()
    assert decode_step_request(step_pb2.StepBegin(step=1, reply={"first": [2, 0]}), three, 1 << 20).reply_first == (
        2,
        0,
    )
    for indices in ([0, 0], [3], [1, 2**32 - 1]):
        begin = step_pb2.StepBegin(step=1, reply={"first": indices})
        assert refused_field(begin, three) == ("begin.reply.first", Reason.INVALID_CONFIG)


CHANGED = step_pb2.REPLY_MODE_CHANGED


def test_patches_are_of_bfloat16_and_relative_to_a_step() -> None:
    halves = decoded_config(reply_dtype=tensor_pb2.DTYPE_BFLOAT16)
    begin = step_pb2.StepBegin(step=5, reply={"mode": CHANGED, "base": 4})
    assert decode_step_request(begin, halves, 1 << 20).reply_base == 4
    assert decode_step_request(step_pb2.StepBegin(step=5, reply={"base": 4}), halves, 1 << 20).reply_base is None
    assert decode_step_request(step_pb2.StepBegin(step=5, reply={"mode": CHANGED}), halves, 1 << 20).reply_base == -1
    assert refused_field(begin, decoded_config()) == ("begin.reply.mode", Reason.INVALID_CONFIG)


ALLOW = optimizer_pb2.NON_FINITE_POLICY_ALLOW
LAMB = optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_LAMB)


def test_a_step_may_be_applied_as_it_arrives_where_nothing_needs_all_of_it() -> None:
    free = decoded_config(gradient=optimizer_pb2.GradientTreatment(non_finite=ALLOW, clip_grad_value=1.0))
    assert decode_step_request(step_pb2.StepBegin(step=1, overlap=True), free, 1 << 20).overlap is True


@pytest.mark.parametrize(
    ("obstacle", "fields"),
    [
        ("the policy 'reject'", {"gradient": optimizer_pb2.GradientTreatment()}),
        ("clip_grad_norm", {"gradient": optimizer_pb2.GradientTreatment(non_finite=ALLOW, clip_grad_norm=1.0)}),
        (
            "clip_grad_norm",
            {
                "gradient": optimizer_pb2.GradientTreatment(non_finite=ALLOW),
                "groups": [optimizer_pb2.ParameterGroup(clip_grad_norm=1.0)],
            },
        ),
        ("the policy 'skip'", {"gradient": optimizer_pb2.GradientTreatment(loss_scaling=optimizer_pb2.LossScaling())}),
        (
            "accumulation_steps",
            {"gradient": optimizer_pb2.GradientTreatment(non_finite=ALLOW, accumulation_steps=2)},
        ),
        (
            "the layerwise rule 'lamb'",
            {"gradient": optimizer_pb2.GradientTreatment(non_finite=ALLOW), "optimizer": LAMB},
        ),
        ("two_phase", {"gradient": optimizer_pb2.GradientTreatment(non_finite=ALLOW, two_phase=True)}),
    ],
)
def test_overlap_is_refused_with_what_needs_the_whole_gradient(obstacle: str, fields: dict[str, Any]) -> None:
    begin = step_pb2.StepBegin(step=1, overlap=True)
    with pytest.raises(InvalidRequestError, match=rf"begin.overlap: .*: {obstacle}.* needs the whole gradient first"):
        decode_step_request(begin, decoded_config(**fields), 1 << 20)


def test_overlap_is_refused_with_patches() -> None:
    halves = decoded_config(
        reply_dtype=tensor_pb2.DTYPE_BFLOAT16, gradient=optimizer_pb2.GradientTreatment(non_finite=ALLOW)
    )
    begin = step_pb2.StepBegin(step=1, overlap=True, reply={"mode": CHANGED})
    assert refused_field(begin, halves) == ("begin.overlap", Reason.INVALID_CONFIG)


def commit(**fields: Any) -> step_pb2.StepCommit:
    return step_pb2.StepCommit(**fields)


def two_phase() -> SessionConfig:
    return decoded_config(
        gradient=optimizer_pb2.GradientTreatment(two_phase=True),
        groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()],
    )


def test_a_commit_brings_what_the_coordinator_decided_or_nothing() -> None:
    cut = two_phase()
    assert decode_decision(commit(), cut) is None
    assert decode_decision(commit(), decoded_config()) is None
    assert decode_decision(commit(clip_coefficient=0.25), cut) == Decision(0.25, (), False)
    assert decode_decision(commit(skip=True), cut) == Decision(1.0, (), True)
    expected = Decision(1.0, (0.5, 1.0), False)
    assert decode_decision(commit(clip_coefficient=1.0, group_coefficients=[0.5, 1.0]), cut) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"clip_coefficient": 1.5}, "commit.clip_coefficient"),
        ({"clip_coefficient": -0.1}, "commit.clip_coefficient"),
        ({"clip_coefficient": float("nan")}, "commit.clip_coefficient"),
        ({"group_coefficients": [0.5]}, "commit.group_coefficients"),
        ({"group_coefficients": [0.5, 2.0]}, "commit.group_coefficients"),
    ],
)
def test_factors_that_are_none_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        decode_decision(commit(**fields), two_phase())
    assert refused.value.metadata["field"] == field


def test_a_session_that_decides_by_itself_takes_no_factor() -> None:
    with pytest.raises(InvalidRequestError, match="commit.clip_coefficient: the session decides by itself"):
        decode_decision(commit(skip=True), decoded_config())


def test_where_nan_is_applied_a_factor_may_be_nan() -> None:
    applied = decoded_config(gradient=optimizer_pb2.GradientTreatment(two_phase=True, non_finite=ALLOW))
    decision = decode_decision(commit(clip_coefficient=float("nan")), applied)
    assert decision is not None and math.isnan(decision.coefficient)
    with pytest.raises(InvalidRequestError, match=r"commit.clip_coefficient: 1.5; a factor of clipping is in \[0, 1\]"):
        decode_decision(commit(clip_coefficient=1.5), applied)
