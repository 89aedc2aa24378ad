"""A session as its server described it, with the layout of its tensors made ready for packing."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from stepwire.arrays.packing import Packer
from stepwire.v1 import aggregation_pb2, session_pb2
from stepwire.wire.channel_options import chunk_bytes_for
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.messages import layout_from_wire

__all__ = ["SessionDescription"]


class SessionDescription(NamedTuple):
    """The fixed properties of one session, and its numbers as of its creation or its discovery.

    Attributes:
        message: the session as the server described it.
        packer: the packer of its tensors.
        chunk_bytes: the largest payload of a message.
    """

    message: session_pb2.Session
    packer: Packer
    chunk_bytes: int

    @classmethod
    def of(cls, message: session_pb2.Session, max_chunk_bytes: int) -> SessionDescription:
        """Describe a session of a server with chunks of at most `max_chunk_bytes`."""
        names = tuple(tensor.name for tensor in message.config.tensors)
        packer = Packer(dataclasses.replace(layout_from_wire(message.layout), names=names))
        return cls(message, packer, chunk_bytes_for(packer.layout.size * FLOAT32.itemsize, max_chunk_bytes))

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.message.session_id

    @property
    def is_aggregated(self) -> bool:
        """The session is for several workers."""
        return self.message.config.aggregation.mode != aggregation_pb2.AGGREGATION_MODE_UNSPECIFIED

    @property
    def has_rounds(self) -> bool:
        """The gradients of several workers are one step."""
        return self.message.config.aggregation.mode == aggregation_pb2.AGGREGATION_MODE_SYNC

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the state arrays that each tensor has."""
        return tuple(self.message.layout.slots)
