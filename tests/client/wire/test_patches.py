"""Patches of bfloat16 values: every change is brought, and no lie is believed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError, Reason
from stepwire.wire.patches import apply_patch, encode_patch

PATTERNS = st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535), st.booleans()), max_size=70)


def sides(changes: list[tuple[int, int, bool]]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    before = np.array([old for old, _, _ in changes], np.uint16)
    after = np.array([new if differs else old for old, new, differs in changes], np.uint16)
    return before, after


@given(PATTERNS)
def test_a_patch_turns_one_side_into_the_other_and_is_smaller(changes: list[tuple[int, int, bool]]) -> None:
    before, after = sides(changes)
    changed = int((before != after).sum())
    patch = encode_patch(before, after)
    if patch is None:
        assert -(-len(after) // 8) + 2 * changed >= 2 * len(after)
        return
    assert len(patch) == -(-len(after) // 8) + 2 * changed < 2 * len(after)
    apply_patch(before, patch)
    assert before.tobytes() == after.tobytes()


def test_the_bytes_are_those_of_the_contract() -> None:
    before, after = np.zeros(10, np.uint16), np.zeros(10, np.uint16)
    after[[1, 9]] = [0x1234, 0x8000]
    assert encode_patch(before, after) == bytes([0b10, 0b10, 0x34, 0x12, 0x00, 0x80])


def test_equal_numbers_of_other_bits_are_changes() -> None:
    before, after = np.zeros(64, np.uint16), np.zeros(64, np.uint16)
    before[:3], after[:3] = [0x0000, 0x7FC0, 0x7F80], [0x8000, 0x7FC1, 0x7F80]
    patch = encode_patch(before, after)
    assert patch is not None and len(patch) == 8 + 4
    apply_patch(before, patch)
    assert before.tobytes() == after.tobytes()


def test_nothing_changed_is_bits_alone_and_nothing_at_all_is_no_patch() -> None:
    values = np.arange(17, dtype=np.uint16)
    assert encode_patch(values, values) == bytes(3)
    assert encode_patch(values[:0], values[:0]) is None
    apply_patch(values[:0], b"")


@given(st.integers(0, 70), st.binary(max_size=160))
def test_whatever_is_received_is_applied_whole_or_refused_and_changes_nothing(count: int, payload: bytes) -> None:
    values = np.arange(count, dtype=np.uint16)
    bits = np.unpackbits(np.frombuffer(payload, np.uint8)[: -(-count // 8)], bitorder="little")
    marked = np.flatnonzero(bits)
    right = len(payload) == -(-count // 8) + 2 * len(marked) and (marked < count).all()
    if right:
        apply_patch(values, payload)
        want = np.arange(count, dtype=np.uint16)
        want[marked] = np.frombuffer(payload[-(-count // 8) :], np.uint16)
        assert values.tolist() == want.tolist()
        return
    with pytest.raises(InvalidRequestError) as refused:
        apply_patch(values, payload)
    assert refused.value.reason is Reason.INVALID_TENSOR
    assert values.tolist() == list(range(count))


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"", "has 0 bytes and needs 2 for the bits alone"),
        (b"\x01", "has 1 bytes and needs 2"),
        (b"\x00\x10\x00\x00", "marks values beyond the last as changed"),
        (b"\x01\x00", "has 2 bytes and the values it marks as changed need 4"),
        (b"\x01\x00\x01", "has 3 bytes and the values it marks as changed need 4"),
        (b"\x01\x00\x01\x02\x03\x04", "has 6 bytes and the values it marks as changed need 4"),
    ],
)
def test_a_refusal_says_what_is_wrong_with_it(payload: bytes, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        apply_patch(np.zeros(12, np.uint16), payload)
    assert refused.value.metadata["field"] == "chunk.patch"


def test_memory_of_any_kind_and_alignment_is_read() -> None:
    patch = bytes([0b11, 1, 0, 2, 0])
    for payload in (patch, memoryview(patch), np.frombuffer(b"." + patch, np.uint8)[1:]):
        values = np.zeros(8, np.uint16)
        apply_patch(values, payload)
        assert values.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
