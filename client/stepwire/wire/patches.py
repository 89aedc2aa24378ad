"""The encoding of `Chunk.patch`: the bfloat16 values that differ, bit for bit, from the receiver's values.

A patch of n values starts with ceil(n / 8) bytes. Bit i mod 8 of byte i / 8 is set if value i changed. The new values
of the set bits follow, in order. Parameters change little in a step, and bfloat16's 8 bits of mantissa lose much of the
change. A patch has little more than half of the bytes when half of the values stay.

Values are bit patterns in uint16, since equal values need not have equal bits: −0 replaces 0, and one NaN another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["apply_patch", "encode_patch"]

_Patterns = npt.NDArray[np.uint16]


def encode_patch(before: _Patterns, after: _Patterns) -> bytes | None:
    """Return the patch that turns `before` into `after`.

    Args:
        before: the receiver's values, `(n,) uint16`.
        after: the values that the receiver needs, `(n,) uint16`.

    Returns:
        The patch; None if the patch would not be smaller than `after`.
    """
    changed = before != after
    count = int(np.count_nonzero(changed))
    if _mask_bytes(len(after)) + 2 * count >= 2 * len(after):
        return None
    bits: bytes = np.packbits(changed, bitorder="little").tobytes()
    values: bytes = after[changed].tobytes()
    return bits + values


def apply_patch(values: _Patterns, payload: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
    """Apply a patch to values. A patch that is refused changes no value.

    Args:
        values: the present values, `(n,) uint16`; changed in place.
        payload: the patch.

    Raises:
        InvalidRequestError: the payload is not a patch of n values (INVALID_TENSOR). The number of its bytes does not
            fit its set bits, or bits are set beyond the n-th.
    """
    received = np.frombuffer(payload, np.uint8)
    mask_bytes = _mask_bytes(len(values))
    if received.size < mask_bytes:
        raise _invalid_patch(f"has {received.size} bytes and needs {mask_bytes} for the bits alone", values, received)
    bits = np.unpackbits(received[:mask_bytes], bitorder="little").view(np.bool_)
    if bits[len(values) :].any():
        raise _invalid_patch("marks values beyond the last as changed", values, received)
    changed = bits[: len(values)]
    expected = mask_bytes + 2 * int(np.count_nonzero(changed))
    if received.size != expected:
        problem = f"has {received.size} bytes and the values it marks as changed need {expected}"
        raise _invalid_patch(problem, values, received)
    values[changed] = received[mask_bytes:].view(np.uint16)


def _mask_bytes(count: int) -> int:
    return -(-count // 8)


def _invalid_patch(problem: str, values: _Patterns, received: npt.NDArray[np.uint8]) -> InvalidRequestError:
    return InvalidRequestError.of(
        "chunk.patch",
        f"the patch of {len(values)} values {problem}; request all parameters (REPLY_MODE_PARAMETERS) to continue",
        reason=Reason.INVALID_TENSOR,
        count=len(values),
        payload_bytes=int(received.size),
    )
