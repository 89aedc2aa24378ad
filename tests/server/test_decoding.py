"""From messages to the domain's records: defaults, and what each value becomes. Refusals are in `test_bad_*.py`."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire.codecs import BFLOAT16, FLOAT16, FLOAT32
from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam, AdamW
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire_server import decoding
from stepwire_server.config import ServerConfig
from stepwire_server.plan import NonFinitePolicy, SessionPlan, StepOrder

LIMITS = ServerConfig(max_lease_seconds=100.0, max_tensors=5)


def config(**fields: Any) -> session_pb2.SessionConfig:
    defaults: dict[str, Any] = {
        "tensors": [tensor_pb2.TensorSpec(name="w", shape=[2, 3])],
        "optimizer": optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    }
    return session_pb2.SessionConfig(**defaults | fields)


def plan(**fields: Any) -> SessionPlan:
    return decoding.decode_plan(config(**fields), LIMITS, "cpu")


def optimizer(**fields: Any) -> optimizer_pb2.Optimizer:
    return optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM, **fields)


def numbers(**fields: Any) -> optimizer_pb2.Hyperparameters:
    return optimizer_pb2.Hyperparameters(**fields)


def test_a_minimal_config_takes_the_contracts_defaults() -> None:
    assert plan() == SessionPlan(
        layout=place([TensorSpec("w", (2, 3))], 1),
        optimizer=Adam(),
        groups=(Adam().hyperparameters(),),
        non_finite=NonFinitePolicy.REJECT,
        gradient_dtype=FLOAT32,
        reply_dtype=FLOAT32,
        start_at_zero=False,
        lease_seconds=100.0,
        label="",
    )


def test_decoupled_decay_has_a_default_of_its_own() -> None:
    assert plan(optimizer=optimizer(decoupled_weight_decay=True)).optimizer == Adam(
        weight_decay=AdamW().weight_decay, decoupled_weight_decay=True
    )
    undecayed = optimizer(decoupled_weight_decay=True, hyperparameters=numbers(weight_decay=0.0))
    assert plan(optimizer=undecayed).optimizer == Adam(decoupled_weight_decay=True)


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
        gradient=optimizer_pb2.GradientTreatment(non_finite=optimizer_pb2.NON_FINITE_POLICY_SKIP),
        gradient_dtype=tensor_pb2.DTYPE_BFLOAT16,
        reply_dtype=tensor_pb2.DTYPE_FLOAT16,
        initialization=session_pb2.INITIALIZATION_ZEROS,
        lease_seconds=0.5,
        label="l" * 128,
        device="cpu",
    )
    assert (decoded.non_finite, decoded.gradient_dtype, decoded.reply_dtype) == (
        NonFinitePolicy.SKIP,
        BFLOAT16,
        FLOAT16,
    )
    assert (decoded.start_at_zero, decoded.lease_seconds, decoded.label) == (True, 0.5, "l" * 128)


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
    assert order(step=7, epoch=3) == StepOrder(7, 3, BFLOAT16, FLOAT16, True, 1 << 19, ORDER_PLAN.groups)


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
