"""The messages of pulls and loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stepwire.arrays.packing import Flat, Packer
from stepwire.errors import UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, tensor_pb2
from stepwire.wire.dtypes import FLOAT32, dtype_to_wire
from stepwire.wire.frames import FrameBuffer, read_frame

__all__ = ["load_messages", "read_pull"]


def read_pull(
    messages: Iterator[bytes], packer: Packer, dtype: np.dtype[Any], targets: Mapping[str, Flat]
) -> state_pb2.PullHeader:
    """Decode the messages of a pull into the target arrays of each slot.

    Raises:
        UnavailableError: the server ended the stream early.
    """
    header: state_pb2.PullHeader | None = None
    missing = packer.layout.size * len(targets)
    for data in messages:
        frame = read_frame(pb.PullResponse, data)
        message: pb.PullResponse = frame.message
        if message.HasField("header"):
            header = message.header
        if message.HasField("chunk"):
            chunk = message.chunk
            packer.read(
                targets[message.slot],
                packer.ranges(chunk.offset, chunk.count),
                frame.payload.view(dtype),
            )
            missing -= chunk.count
    if header is None or missing:
        raise UnavailableError(f"the server ended a pull {missing} elements early; pull again")
    return header


def load_messages(
    opening: state_pb2.LoadOpen, packer: Packer, sources: Mapping[str, Flat], chunk_bytes: int
) -> Iterator[bytes]:
    """Yield the messages of a load of float32 values, each made on demand."""
    opening.dtype = dtype_to_wire(FLOAT32)
    yield pb.LoadRequest(open=opening).SerializeToString()
    for slot, flat in sources.items():
        for offset, count, ranges in packer.chunks(chunk_bytes // FLOAT32.itemsize):
            header = pb.LoadRequest(slot=slot, chunk=tensor_pb2.Chunk(offset=offset, count=count))
            frame = FrameBuffer(header, count * FLOAT32.itemsize)
            packer.write(flat, ranges, frame.payload(FLOAT32))
            yield frame.finish()
    yield pb.LoadRequest(commit=True).SerializeToString()
