"""The offer of a packet lane to a client that attaches, and the sessions whose steps fit on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import wire_bytes
from stepwire.wire.packets import PAYLOAD_BYTES, REPLY_BYTES
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sharing.host_buffers import HostBuffers
from stepwire_server.sharing.packet_lane import PacketLane

__all__ = ["LaneOffer", "is_small", "tells_little"]

# The telemetry of one group, and of one worker, with every field set, is smaller than this.
_GROUP_BYTES: Final = 384
_WORKER_BYTES: Final = 48
_RESULT_BYTES: Final = 1024


class LaneOffer:
    """A lane, and the memory beside it if there is some; an `Offer`."""

    def __init__(self, lane: PacketLane, buffers: HostBuffers | None) -> None:
        """Offer the client's end of a lane."""
        self._lane = lane
        self._buffers = buffers

    def descriptors(self) -> Sequence[int]:
        """See `Offer`: those of the memory, and the one of the lane."""
        memory = () if self._buffers is None else self._buffers.descriptors()
        return (*memory, self._lane.descriptor)

    def response(self) -> transport_pb2.HandoffResponse:
        """See `Offer`: the message is empty, since the client only needs the descriptors."""
        return transport_pb2.HandoffResponse()

    def released(self) -> None:
        """See `Offer`: memory and lane end with the stream."""


def is_small(config: SessionConfig) -> bool:
    """Tell whether a step fits into one packet each way, by the dtypes of its session."""
    size = config.layout.size
    gradient, reply = wire_bytes(config.gradient_dtype, size), size * config.reply_dtype.itemsize
    return max(gradient, reply) <= PAYLOAD_BYTES


def tells_little(config: SessionConfig) -> bool:
    """Tell whether the result of a step fits into a packet beside the largest payload."""
    workers = 0 if config.aggregation is None else config.aggregation.workers
    result = _RESULT_BYTES + len(config.groups) * _GROUP_BYTES + workers * _WORKER_BYTES
    return result <= REPLY_BYTES - PAYLOAD_BYTES
