"""What a step asks for, whatever the steps before it asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.arrays.packing import Packer
from stepwire.arrays.trees import Structure
from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec, place
from stepwire.steps.build import StepBuilder, StepOptions
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2

LAYOUT = place([TensorSpec("a", (3,)), TensorSpec("b", (2, 2)), TensorSpec("c", (4,), 1)], 2)
GRADIENTS = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32), "c": np.ones(4, np.float32)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.5},
    {"hyperparameters": {"eps": 0.25}},
    {"hyperparameters": [{"lr": 0.5}, {}]},
    {"loss_scale": 8.0},
    {"gradient_dtype": "bfloat16"},
    {"reply_dtype": "bfloat16"},
    {"reply_dtype": "bfloat16", "reply": "changed"},
    {"reply": "none"},
    {"reply_first": ("c", "a")},
    {"overlap": True},
]


def make_builder() -> StepBuilder:
    numbers = optimizer_pb2.Hyperparameters(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
    config = session_pb2.SessionConfig(
        optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
        groups=[optimizer_pb2.ParameterGroup(overrides=numbers)] * 2,
        gradient=optimizer_pb2.GradientTreatment(missing_gradient=optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP),
    )
    message = session_pb2.Session(epoch=7, config=config)
    carry = Carry(message, LAYOUT.size, error_feedback=False)
    return StepBuilder(SessionDescription(message, Packer(LAYOUT), 1 << 20), carry)


def begin_of(builder: StepBuilder, options: dict[str, Any], left_out: tuple[str, ...] = ()) -> step_pb2.StepBegin:
    gradients = {name: array for name, array in GRADIENTS.items() if name not in left_out}
    return builder.build(gradients, StepOptions(**options))[0].begin


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "defaults")
def test_what_a_step_asks_for_does_not_depend_on_the_steps_before(options: dict[str, Any]) -> None:
    expected, builder = begin_of(make_builder(), options), make_builder()
    for before in OPTIONS:
        begin = begin_of(builder, before, left_out=("b",))
        assert list(begin.missing_tensors) == [1]
        begin.step, begin.epoch, begin.load, begin.reply.base = 3, 7, 1, 2  # as the hold writes into it
        assert begin_of(builder, options) == expected


def test_a_step_asks_for_what_its_options_say() -> None:
    begin = begin_of(make_builder(), {"lr": 0.5, "loss_scale": 8.0, "reply_dtype": "float16", "reply_first": ("c",)})
    assert begin == step_pb2.StepBegin(
        gradient_dtype=tensor_pb2.DTYPE_FLOAT32,
        hyperparameters=[optimizer_pb2.Hyperparameters(lr=0.5)] * 2,
        reply=step_pb2.ReplyOptions(
            mode=step_pb2.REPLY_MODE_PARAMETERS, dtype=tensor_pb2.DTYPE_FLOAT16, chunk_bytes=1 << 20, first=[2]
        ),
        loss_scale=8.0,
    )


def test_a_step_that_is_refused_leaves_no_trace_in_the_next() -> None:
    builder = make_builder()
    expected = begin_of(make_builder(), {})
    for wrong in [{"lr": -1.0}, {"reply_first": ("a", "nothing")}, {"reply": "some"}]:
        with pytest.raises(InvalidRequestError):
            begin_of(builder, wrong)
        assert begin_of(builder, {}) == expected


def test_a_new_reply_lies_where_its_targets_do() -> None:
    call, made = make_builder().build_tree(GRADIENTS, StepOptions(), Structure())
    for number, target in enumerate(call.targets):
        target[...] = number
    reply: Any = made()
    assert {name: array.tolist() for name, array in reply.items()} == {
        "a": [0, 0, 0],
        "b": [[1, 1], [1, 1]],
        "c": [2, 2, 2, 2],
    }


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["whole", "overlap"])
def test_a_reply_over_the_gradient_is_refused(options: dict[str, Any]) -> None:
    """A broken reply would leave a mixture: it would be sent again as the gradient, or be told from the gradient."""
    apart = {name: np.empty_like(array) for name, array in GRADIENTS.items()}
    both = np.zeros(6, np.float32)
    for gradient, out in ((both[:4], both[:4]), (both[:4], both[2:])):
        builder = make_builder()
        with pytest.raises(InvalidRequestError, match=r"^out\['b'\]: the array shares memory with the gradient"):
            builder.build(
                GRADIENTS | {"b": gradient.reshape(2, 2)},
                StepOptions(out=apart | {"b": out.reshape(2, 2)}, **options),
            )
    call, reply = make_builder().build({"a": GRADIENTS["a"], "c": GRADIENTS["c"]}, StepOptions(out=apart, **options))
    assert reply is apart and call.missing == {1}
