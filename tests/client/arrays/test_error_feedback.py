"""The encoding error of one gradient is added to the next, once for each applied step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.arrays.packing import Packer
from stepwire.layout import TensorSpec, place
from stepwire.wire.dtypes import wire_items
from stepwire.wire.int8_blocks import BATCH, BLOCK, INT8, decode_blocks

LAYOUT = place([TensorSpec("a", (700,)), TensorSpec("b", (40, 10)), TensorSpec("c", (BATCH,), 1)], 2)
COUNTS = {tensor.spec.name: tensor.count for tensor in LAYOUT.tensors}


def sent(packer: Packer, arrays: dict[str, Any], feedback: ErrorFeedback | None, most: int = 1 << 20) -> Any:
    """Send a step in chunks; return the blocks of the whole space and their decoded values."""
    flat, _ = packer.present(arrays, "gradients", frozenset(COUNTS))
    space = np.zeros(wire_items(INT8, packer.layout.size), INT8)
    for offset, count, ranges in packer.chunks(most, INT8):
        chunk = space[offset // BLOCK :][: wire_items(INT8, count)]
        packer.write(flat, ranges, chunk, offset, feedback)
    return space, decode_blocks(space, packer.layout.size)


def gradients(seed: int, scale: float = 1.0, **changes: Any) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    made = {t.spec.name: (random.standard_normal(t.spec.shape) * scale).astype(np.float32) for t in LAYOUT.tensors}
    return made | changes


def flattened(arrays: dict[str, Any]) -> npt.NDArray[np.float32]:
    space = np.zeros(LAYOUT.size, np.float32)
    for tensor in LAYOUT.tensors:
        if arrays[tensor.spec.name] is not None:
            space[tensor.offset : tensor.end] = arrays[tensor.spec.name].reshape(-1)
    return space


@given(st.integers(0, 1000), st.integers(1, 5))
def test_what_has_been_sent_and_what_is_left_over_make_what_was_given(seed: int, steps: int) -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    given_in_all, sent_in_all = np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for step in range(steps):
        arrays = gradients(seed + step)
        given_in_all += flattened(arrays)
        sent_in_all += sent(packer, arrays, feedback)[1]
        feedback.accept()
    assert np.abs(given_in_all - sent_in_all - feedback.residual).max() < 1e-5
    assert np.abs(feedback.residual).max() < 6.0 / 254.0


def test_an_element_too_small_for_a_code_arrives_in_the_end() -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    arrays = {name: np.zeros(tensor.shape, np.float32) for name, tensor in gradients(0).items()}
    arrays["a"][:2] = [1.0, 0.001]
    totals = {True: 0.0, False: 0.0}
    for _ in range(100):
        for fed_back in totals:
            totals[fed_back] += float(sent(packer, arrays, feedback if fed_back else None)[1][1])
        feedback.accept()
    assert totals[False] == 0.0
    assert abs(totals[True] - 0.1) < 1.0 / 254.0 + 1e-5


def test_a_step_that_is_repeated_brings_the_same_bytes_until_it_is_accepted() -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    sent(packer, gradients(1), feedback)
    feedback.accept()
    residual = feedback.residual.copy()
    first = sent(packer, gradients(2), feedback)[0]
    feedback.discard()
    assert (feedback.residual == residual).all() and residual.any()
    assert sent(packer, gradients(2), feedback, most=512)[0].tobytes() == first.tobytes()
    feedback.accept()
    assert (feedback.residual != residual).any()
    assert sent(packer, gradients(2), feedback)[0].tobytes() != first.tobytes()


def test_what_is_accepted_is_the_last_sending_whatever_was_broken_off_before() -> None:
    packer, feedback, other = Packer(LAYOUT), ErrorFeedback(LAYOUT.size), ErrorFeedback(LAYOUT.size)
    flat = packer.ordered(gradients(3), "gradients")
    for offset, count, ranges in packer.chunks(256, INT8)[:2]:
        packer.write(flat, ranges, np.zeros(wire_items(INT8, count), INT8), offset, feedback)
    feedback.discard()
    for each in (feedback, other):
        sent(packer, gradients(4), each)
        each.accept()
    assert feedback.residual.tobytes() == other.residual.tobytes()


def test_tensors_without_a_gradient_keep_what_is_left_over() -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    sent(packer, gradients(5), feedback)
    feedback.accept()
    before = feedback.residual.copy()
    _, decoded = sent(packer, gradients(6, b=None), feedback)
    feedback.accept()
    inside, outside = slice(700, 1100), [*range(700), *range(1280, LAYOUT.size)]
    assert (feedback.residual[inside] == before[inside]).all() and before[inside].any()
    assert not decoded[inside].any()
    assert (feedback.residual[outside] != before[outside]).mean() > 0.9


def test_what_is_not_finite_leaves_nothing_behind() -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    sent(packer, gradients(7), feedback)
    feedback.accept()
    arrays = gradients(8, 1e37)
    arrays["a"][:3] = [np.nan, np.inf, 3.4e38]
    with np.errstate(all="raise"):
        sent(packer, arrays, feedback)
        feedback.accept()
    assert np.isfinite(feedback.residual).all()
    assert not feedback.residual[:BLOCK].any() and feedback.residual[BLOCK:700].any()


def test_clearing_forgets_everything() -> None:
    packer, feedback = Packer(LAYOUT), ErrorFeedback(LAYOUT.size)
    sent(packer, gradients(9), feedback)
    feedback.accept()
    sent(packer, gradients(9), feedback)
    feedback.clear()
    feedback.accept()
    assert not feedback.residual.any()


def test_a_space_that_is_sent_as_a_whole_is_accepted_without_a_copy() -> None:
    layout = place([TensorSpec("a", (700,))], 1)
    packer, feedback = Packer(layout), ErrorFeedback(layout.size)
    pending = feedback._pending
    packer.write(
        packer.ordered({"a": np.ones(700, np.float32)}, "g"), packer.ranges(0, 700), np.zeros(3, INT8), 0, feedback
    )
    feedback.accept()
    assert feedback.residual is pending
