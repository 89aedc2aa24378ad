"""A step whose gradient and answer lie in shared memory."""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from stepwire.wire.dtypes import BLOCK, wire_bytes
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.step import Step

__all__ = ["MemoryReplyWriter", "StreamMemory", "stage_shared"]

# Of a GPU: it adds up the squares of one piece while the next crosses the bus.
_PIECE_ELEMENTS: Final = 1 << 20


class StreamMemory(Protocol):
    """What one attached stream shares with its client.

    Attributes:
        gradient: items of the session's gradient dtype that hold `layout.size` elements, as an engine takes them. The
            client may change them at any moment.
        parameters: `(layout.size,)` of the session's reply dtype, as an engine takes them.
        gradient_bytes: of the gradient's memory.
        parameter_bytes: of the parameters' memory.
        in_place: the parameters of the state itself lie there.
        on_device: both lie on the device that the session lives on.
    """

    gradient: Any
    parameters: Any
    gradient_bytes: int
    parameter_bytes: int
    in_place: bool
    on_device: bool

    def check(self, pattern: bytes) -> bytes | None:
        """Compare a client's pattern with the start of the gradient's memory.

        Returns:
            As many bytes from the start of the parameters' memory; None where the pattern is not there.
        """
        ...


def stage_shared(buffers: StreamMemory, step: Step, size: int, depth: int) -> None:
    """Stage the gradient where it lies.

    Nothing is copied on the CPU, so a client that changes its gradient during the step gets an update of whatever was
    read: its own loss, and not worth a pass over the memory.

    Args:
        buffers: hold it.
        step: the step.
        size: elements of the flat space.
        depth: of the session's state; above 1 the gradient is staged in pieces, unless it lies on the device.
    """
    if not size:
        return
    received, dtype = buffers.gradient.view(np.uint8), step.request.gradient_dtype
    whole = depth == 1 or buffers.on_device
    for low, high in split_range(0, size, size if whole else _PIECE_ELEMENTS):
        assert low % BLOCK == 0
        step.add(low, high - low, received[wire_bytes(dtype, low) : wire_bytes(dtype, high)])


class MemoryReplyWriter:
    """Takes an answer where it lies in memory, `(size,)` of the reply dtype; see `ReplyWriter`."""

    def __init__(self, values: Any) -> None:
        """Write there."""
        self._values = values

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplyWriter`."""
        part: HostArray = self._values[offset : offset + count]
        return part

    def before(self) -> HostArray:
        """See `ReplyWriter`: patches travel in messages, so nobody asks."""
        raise AssertionError("an answer in shared memory is no patch")

    def flush(self) -> None:
        """See `ReplyWriter`."""
