"""The reader of one reply: the place of each chunk, the missing elements, and the tensors that are whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Packer
from stepwire.arrays.rows import RowReader
from stepwire.errors import UnavailableError
from stepwire.steps.call import StepCall
from stepwire.steps.shared import read_shared_reply
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import tensor_pb2
from stepwire.wire.frames import Frame
from stepwire.wire.patches import apply_patch

__all__ = ["ReplyReader"]


class ReplyReader:
    """Reads one reply into the arrays of its call."""

    def __init__(self, packer: Packer, call: StepCall, shared: SharedArrays | None = None) -> None:
        """Await all parameters that the call wants, in messages or in shared memory."""
        self._packer = packer
        self._call = call
        self._shared = shared
        self._missing = packer.layout.dense_size if call.wants_reply and call.patched is None and shared is None else 0
        self._rows = RowReader(packer.layout, call.row_targets) if call.row_targets else None
        self._left = [tensor.count for tensor in packer.layout.tensors] if call.on_tensor is not None else []

    def read(self, frame: Frame) -> None:
        """Read the chunk of a message, if it has one.

        Raises:
            InvalidRequestError: the patch cannot be decoded.
        """
        message: pb.AttachResponse = frame.message
        if not message.HasField("chunk"):
            return
        chunk, call = message.chunk, self._call
        if call.patched is not None:
            _patch(call.patched, chunk, frame)
            return
        if chunk.rows:
            self._read_rows(chunk, frame)
            return
        ranges = self._packer.ranges(chunk.offset, chunk.count)
        self._packer.read(call.targets, ranges, frame.payload.view(call.reply_dtype))
        self._missing -= chunk.count
        if call.on_tensor is not None:
            for part in ranges:
                self._left[part.tensor] -= part.end - part.begin
                if not self._left[part.tensor]:
                    call.on_tensor(part.tensor)

    def _read_rows(self, chunk: tensor_pb2.Chunk, frame: Frame) -> None:
        reader, call = self._rows or RowReader(self._packer.layout, ()), self._call
        table = reader.read(chunk, frame.payload.view(call.reply_dtype))
        if table is not None and call.on_tensor is not None:
            call.on_tensor(table)

    def finish(self) -> None:
        """Check that all chunks came, and hand out patched parameters, or those in shared memory.

        Raises:
            UnavailableError: the server ended the reply early, or the device failed.
        """
        call = self._call
        if self._missing:
            raise UnavailableError(f"the reply to step {call.begin.step} lacks {self._missing} elements")
        if self._rows is not None and self._rows.missing:
            raise UnavailableError(f"the reply to step {call.begin.step} lacks {self._rows.missing} rows")
        if self._shared is not None:
            read_shared_reply(self._shared, call)
        elif call.on_tensor is not None:
            for index, tensor in enumerate(self._packer.layout.tensors):
                if not (tensor.count or tensor.spec.table):  # no chunk brings it
                    call.on_tensor(index)
        if call.patched is not None:
            size = self._packer.layout.size
            self._packer.read(call.targets, self._packer.ranges(0, size), call.patched)


def _patch(patched: npt.NDArray[Any], chunk: tensor_pb2.Chunk, frame: Frame) -> None:
    """Change parameters by a chunk of a reply: a patch, or whole values."""
    values = patched[chunk.offset : chunk.offset + chunk.count].view(np.uint16)
    if chunk.patch:
        apply_patch(values, frame.payload)
    else:
        values[:] = frame.payload.view(np.uint16)
