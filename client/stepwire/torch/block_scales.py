"""The maxima of 8-bit moments, for a load that changes moments or their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.wire.int8_blocks import BLOCK

__all__ = ["levelled"]

Named = Mapping[str, npt.NDArray[Any]]


def levelled(values: Named, scales: Named, groups: Sequence[Sequence[str]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return scales with which no value of a slot overflows its code.

    A server keeps one maximum for a block, and a group begins with a new block. Each element is sent with the maximum
    of its block. Elements that come into one block from several ones, or from the user, share the largest maximum among
    them.

    Args:
        values: the moments, by name.
        scales: the maxima of the blocks that the moments were read from, in the same shapes; 0 without one.
        groups: the names of the tensors of each group, in the order of the session.
    """
    made: dict[str, npt.NDArray[np.float32]] = {}
    for names in groups:
        if not names:
            continue
        largest = np.concatenate([np.maximum(np.abs(values[name]), scales[name]).reshape(-1) for name in names])
        padded = np.zeros(-(-len(largest) // BLOCK) * BLOCK, np.float32)
        padded[: len(largest)] = largest
        spread = np.repeat(padded.reshape(-1, BLOCK).max(axis=1), BLOCK)
        start = 0
        for name in names:
            made[name] = spread[start : start + values[name].size].reshape(values[name].shape)
            start += values[name].size
    return made
