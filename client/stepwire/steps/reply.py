"""The parameters of one answer as they arrive: where each chunk goes, what is missing, which tensors are whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Packer
from stepwire.errors import UnavailableError
from stepwire.steps.call import StepCall
from stepwire.steps.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import tensor_pb2
from stepwire.wire.frames import Frame
from stepwire.wire.patches import apply_patch

__all__ = ["ReplyReader"]


class ReplyReader:
    """Reads one answer into the arrays of its call."""

    def __init__(self, packer: Packer, call: StepCall, shared: SharedArrays | None = None) -> None:
        """Await everything that the call wants, in messages or in shared memory."""
        self._packer = packer
        self._call = call
        self._shared = shared
        self._missing = packer.layout.size if call.wants_answer and call.held is None and shared is None else 0
        self._left = [tensor.count for tensor in packer.layout.tensors] if call.on_tensor is not None else []

    def take(self, frame: Frame) -> None:
        """Read the chunk of a message, if it has one.

        Raises:
            InvalidRequestError: a patch that is none.
        """
        message: pb.AttachResponse = frame.message
        if not message.HasField("chunk"):
            return
        chunk, call = message.chunk, self._call
        if call.held is not None:
            _hold(call.held, chunk, frame)
            return
        ranges = self._packer.ranges(chunk.offset, chunk.count)
        self._packer.read(call.targets, ranges, frame.payload.view(call.reply_dtype))
        self._missing -= chunk.count
        if call.on_tensor is not None:
            for part in ranges:
                self._left[part.tensor] -= part.end - part.begin
                if not self._left[part.tensor]:
                    call.on_tensor(part.tensor)

    def finish(self) -> None:
        """Check that everything came; hand out what patches have changed, or what lies in shared memory.

        Raises:
            UnavailableError: the server ended the answer early.
        """
        call = self._call
        if self._missing:
            raise UnavailableError(f"the answer to step {call.begin.step} lacks {self._missing} elements")
        if self._shared is not None:
            self._shared.take(call)
        if call.held is not None:
            size = self._packer.layout.size
            self._packer.read(call.targets, self._packer.ranges(0, size), call.held)


def _hold(held: npt.NDArray[Any], chunk: tensor_pb2.Chunk, frame: Frame) -> None:
    """Change what is held by a chunk of an answer, a patch or whole."""
    values = held[chunk.offset : chunk.offset + chunk.count].view(np.uint16)
    if chunk.patch:
        apply_patch(values, frame.payload)
    else:
        values[:] = frame.payload.view(np.uint16)
