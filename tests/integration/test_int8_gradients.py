"""Gradients in 8 bits over a real socket: the steps of what their blocks decode to, with and without error feedback."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.layout import Layout, TensorSpec, place
from stepwire.wire.int8_blocks import BLOCK, INT8, decode_blocks, encode_blocks
from stepwire_server.devices.pool import DevicePool
from tests.integration.training import bits
from tests.support.numpy_server import numpy_pool

SHAPES = {"w": (300, 257), "b": (1021,), "s": (), "v": (5000,)}
SPECS = [TensorSpec(name, shape, int(name == "v")) for name, shape in SHAPES.items()]
LAYOUT = place(SPECS, 2)
GROUPS = [{"params": ["w", "b", "s"]}, {"params": ["v"], "lr": 0.02}]


@pytest.fixture
def pool() -> DevicePool:
    """NumPy: `tests/server/engines/test_int8_gradients.py` has the compiled kernels."""
    return numpy_pool()


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: np.array(random.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def flattened(gradient: dict[str, np.ndarray], layout: Layout = LAYOUT) -> np.ndarray:
    space = np.zeros(layout.size, np.float32)
    for tensor in layout.tensors:
        space[tensor.offset : tensor.end] = gradient[tensor.spec.name].reshape(-1)
    return space


def through_blocks(space: np.ndarray) -> np.ndarray:
    blocks = np.empty(-(-len(space) // BLOCK), INT8)
    encode_blocks(space, blocks)
    return decode_blocks(blocks, len(space))


def named(space: np.ndarray, layout: Layout = LAYOUT) -> dict[str, np.ndarray]:
    tensors = layout.tensors
    return {each.spec.name: space[each.offset : each.end].reshape(each.spec.shape) for each in tensors}


def create(client: stepwire.Client, **options: Any) -> stepwire.Session:
    options = {"optimizer": stepwire.AdamW(lr=0.01), "groups": GROUPS, "clip_grad_norm": 100.0} | options
    return client.create_session(arrays(0), **options)


@pytest.mark.slow
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_precision": "int8", "reply_dtype": "bfloat16"},
        {"optimizer": stepwire.LAMB(lr=0.01), "accumulation_steps": 2},
    ],
    ids=["adamw", "int8 moments", "lamb, accumulated"],
)
def test_steps_are_those_of_the_decoded_gradients(
    client: stepwire.Client, options: dict[str, Any], per_step: bool
) -> None:
    """In chunks, a tensor across many, and blocks across tensors."""
    precision = str(options.get("state_precision", "float32"))
    layout = place([dataclasses.replace(spec, state_precision=precision) for spec in SPECS], 2)
    asked = {} if per_step else {"gradient_dtype": "int8"}
    with create(client, **asked, **options) as coarse, create(client, **options) as fine:
        for step in range(1, 5):
            gradient = arrays(step)
            got = coarse.step(gradient, **({"gradient_dtype": "int8"} if per_step else {}))
            want = fine.step(named(through_blocks(flattened(gradient, layout)), layout))
            assert bits(got) == bits(want)
            assert coarse.last_result is not None and fine.last_result is not None
            assert coarse.last_result.grad_norm == fine.last_result.grad_norm
        assert coarse.state().slots.keys() == fine.state().slots.keys()


def test_a_session_in_int8_takes_steps_in_other_encodings(client: stepwire.Client) -> None:
    with create(client, gradient_dtype="int8") as one, create(client) as other:
        for step, dtype in enumerate(["float32", "bfloat16", "int8", "float32"], start=1):
            gradient = arrays(step)
            assert bits(one.step(gradient, gradient_dtype=dtype)) == bits(other.step(gradient, gradient_dtype=dtype))


def test_error_feedback_adds_what_was_left_over(client: stepwire.Client) -> None:
    residual = np.zeros(LAYOUT.size, np.float32)
    with create(client, gradient_dtype="int8", error_feedback=True) as coarse, create(client) as fine:
        for step in range(1, 5):
            wanted = flattened(arrays(step)) + residual
            sent = through_blocks(wanted)
            assert bits(coarse.step(arrays(step))) == bits(fine.step(named(sent)))
            residual = wanted - sent
        assert residual.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_feedback_of_what_keeps_nothing_is_refused_before_anything_is_made(
    client: stepwire.Client, dtype: str
) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match=f"error_feedback: .* travel as {dtype}") as refused:
        create(client, gradient_dtype=dtype, error_feedback=True)
    assert refused.value.metadata == {"field": "error_feedback"}
    assert list(client.sessions()) == []
    with create(client) as session, pytest.raises(stepwire.InvalidRequestError, match="error_feedback"):
        client.session(session.session_id, error_feedback=True)


def test_a_skipped_step_leaves_the_error_feedback_as_it_was(client: stepwire.Client) -> None:
    options = {"gradient_dtype": "int8", "error_feedback": True, "non_finite": "skip"}
    with create(client, **options) as one, create(client, **options) as other:
        one.step(arrays(1))
        other.step(arrays(1))
        bad = arrays(2)
        bad["b"][7] = np.inf
        one.step(bad)
        assert one.last_result is not None and one.last_result.skipped
        assert bits(one.step(arrays(3))) == bits(other.step(arrays(3)))


def test_nan_is_refused_and_changes_nothing(client: stepwire.Client) -> None:
    with create(client, gradient_dtype="int8") as session:
        before = session.step(arrays(1))
        bad = arrays(2)
        bad["v"][4999] = np.nan
        with pytest.raises(stepwire.NonFiniteGradientError, match="'v' holds NaN or Inf"):
            session.step(bad)
        assert bits(session.pull()) == bits(before)
        session.step(arrays(2))
        assert session.applied_step == 2


def test_answers_and_state_do_not_travel_so(client: stepwire.Client) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="reply_dtype: dtype 'int8' cannot be sent here"):
        create(client, reply_dtype="int8")
    with create(client) as session:
        with pytest.raises(stepwire.InvalidRequestError, match="reply_dtype: dtype 'int8' cannot be sent here"):
            session.step(arrays(1), reply_dtype="int8")
        with pytest.raises(stepwire.InvalidRequestError, match="dtype: dtype 'int8' cannot be sent here"):
            session.pull(dtype="int8")
        with pytest.raises(stepwire.InvalidRequestError, match="dtype int8 is not served; cast it"):
            session.step({name: values.astype(np.int8) for name, values in arrays(1).items()})
    assert "wire_int8" in client.info().features
