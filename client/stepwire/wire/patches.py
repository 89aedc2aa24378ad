"""The codec of `Chunk.patch`: what has changed of bfloat16 values that the receiver holds, bit for bit.

A patch of n values is ceil(n / 8) bytes, in which bit i mod 8 of byte i / 8 tells whether value i changed, and then the
new values of those that did, in order. Parameters change little in a step, and much of that is lost in bfloat16's
8 bits of mantissa; where half of the values stay as they were, a patch has little more than half of the bytes.

Values are patterns, in uint16, since equal values need not be equal bits: −0 replaces 0, and one NaN another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["apply_patch", "encode_patch"]

_Patterns = npt.NDArray[np.uint16]


def encode_patch(before: _Patterns, after: _Patterns) -> bytes | None:
    """Write what turns `before` into `after`.

    Args:
        before: what the receiver holds, `(n,) uint16`.
        after: what it shall hold, `(n,) uint16`.

    Returns:
        The patch, or None where it would be no smaller than `after` itself.
    """
    changed = before != after
    count = int(np.count_nonzero(changed))
    if _mask_bytes(len(after)) + 2 * count >= 2 * len(after):
        return None
    bits: bytes = np.packbits(changed, bitorder="little").tobytes()
    values: bytes = after[changed].tobytes()
    return bits + values


def apply_patch(values: _Patterns, payload: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
    """Change values as a patch says; a patch that is refused changes none.

    Args:
        values: what is held, `(n,) uint16`; changed in place.
        payload: the patch.

    Raises:
        InvalidRequestError: it is no patch of n values: its bytes are too few or too many for the bits set in it, or
            bits are set beyond the n-th (INVALID_TENSOR).
    """
    received = np.frombuffer(payload, np.uint8)
    mask_bytes = _mask_bytes(len(values))
    if received.size < mask_bytes:
        raise _invalid(f"has {received.size} bytes and needs {mask_bytes} for the bits alone", values, received)
    bits = np.unpackbits(received[:mask_bytes], bitorder="little").view(np.bool_)
    if bits[len(values) :].any():
        raise _invalid("marks values beyond the last as changed", values, received)
    changed = bits[: len(values)]
    expected = mask_bytes + 2 * int(np.count_nonzero(changed))
    if received.size != expected:
        problem = f"has {received.size} bytes and the values it marks as changed need {expected}"
        raise _invalid(problem, values, received)
    values[changed] = received[mask_bytes:].view(np.uint16)


def _mask_bytes(count: int) -> int:
    return -(-count // 8)


def _invalid(problem: str, values: _Patterns, received: npt.NDArray[np.uint8]) -> InvalidRequestError:
    return InvalidRequestError(
        f"the patch of {len(values)} values {problem}; ask for all parameters (REPLY_MODE_PARAMETERS) to go on",
        reason=Reason.INVALID_TENSOR,
        metadata={"field": "chunk.patch", "count": len(values), "payload_bytes": int(received.size)},
    )
