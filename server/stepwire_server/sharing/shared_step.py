"""A step with its gradient and its reply in shared memory."""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from stepwire.wire.dtypes import BLOCK, wire_bytes
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.step import Step

__all__ = ["MemoryReplyWriter", "StreamMemory", "stage_shared"]

# The chunk of a gradient for a GPU, which sums the squares of one chunk during the copy of the next. A chunk of 16 MiB
# crosses the bus in several times as long as the server takes to ask for it.
_CHUNK_ELEMENTS: Final = 4 << 20


class StreamMemory(Protocol):
    """The memory that one attached stream shares with its client.

    Attributes:
        gradient: the gradient as an engine's array, `layout.size` elements in items of the session's gradient dtype.
            The client may change the gradient at any moment.
        parameters: the parameters as an engine's array, `(layout.size,)` of the session's reply dtype.
        gradient_bytes: the size of the gradient's memory.
        parameter_bytes: the size of the parameters' memory.
        in_place: True if the state's own parameters are in this memory.
        on_device: True if the memory is on the session's device.
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
            As many bytes from the start of the parameters' memory; None if the pattern is another one.
        """
        ...


def stage_shared(buffers: StreamMemory, step: Step, size: int, depth: int) -> None:
    """Stage the gradient in place.

    The CPU makes no copy. A client that changes its gradient during the step gets an update of the values that were
    read. Only that client loses by it, so a copy is not worth a pass over the memory. A step that is logged is copied:
    the bytes on the disk have to be those that were applied.

    Args:
        buffers: the memory of the stream.
        step: the step.
        size: the number of elements of the flat space.
        depth: the depth of the session's state. Above 1 the gradient is staged in chunks, unless it is on the device.
    """
    if not size:
        return
    received, dtype = buffers.gradient.view(np.uint8), step.request.gradient_dtype
    if step.entry is not None:
        received = received.copy()
    at_once = depth == 1 or buffers.on_device
    for low, high in split_range(0, size, size if at_once else _CHUNK_ELEMENTS):
        assert low % BLOCK == 0
        step.add(low, high - low, received[wire_bytes(dtype, low) : wire_bytes(dtype, high)])


class MemoryReplyWriter:
    """Writes a reply into memory, `(size,)` of the reply dtype; see `ReplyWriter`."""

    def __init__(self, values: Any) -> None:
        """Write into `values`, `(size,)` of the reply dtype."""
        self._values = values

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplyWriter`."""
        values: HostArray = self._values[offset : offset + count]
        return values

    def rows(self, offset: int, rows: HostArray, width: int) -> HostArray:
        """See `ReplyWriter`: rows travel in messages."""
        raise AssertionError("a session with tables shares no memory")

    def before(self) -> HostArray:
        """See `ReplyWriter`: patches travel in messages, so there are no values before."""
        raise AssertionError("a reply in shared memory is no patch")

    def flush(self) -> None:
        """See `ReplyWriter`."""
