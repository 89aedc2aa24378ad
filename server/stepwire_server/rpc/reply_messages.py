"""The messages of a reply: one together with the result, or one a chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import tensor_pb2
from stepwire.wire.frames import FrameBuffer, whole_message
from stepwire.wire.patches import encode_patch
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.step_request import StepRequest
from stepwire_server.steps.reply import ReplyWriter, SharedReplyWriter

__all__ = ["ChunkReplyWriter", "WholeReplyWriter"]


class WholeReplyWriter(SharedReplyWriter):
    """Holds a small reply whole, so that it travels in one message with the result; see `ReplyWriter`."""

    def __init__(self, request: StepRequest, size: int) -> None:
        """Make room for `size` elements, if `request` wants a reply."""
        self._values: HostArray = np.empty(size if request.reply else 0, request.reply_dtype)
        self.form = (WholeReplyWriter, request.reply, request.reply_dtype)

    def alone(self) -> ReplyWriter:
        """See `SharedReplyWriter`."""
        return self

    def follow(self, leader: ReplyWriter) -> None:
        """See `SharedReplyWriter`."""
        assert isinstance(leader, WholeReplyWriter)
        self._values = leader._values

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplyWriter`."""
        return self._values[offset : offset + count]

    def rows(self, offset: int, rows: HostArray, width: int) -> HostArray:
        """See `ReplyWriter`."""
        raise AssertionError("rows go back in chunks")

    def before(self) -> HostArray:
        """See `ReplyWriter`; a small reply is no patch."""
        raise AssertionError("a whole reply has no base")

    def flush(self) -> None:
        """See `ReplyWriter`."""

    def message(self, header: pb.AttachResponse | pb.StepResponse) -> bytes:
        """Put the reply behind the header's fields."""
        if not self._values.size:
            return header.SerializeToString()
        if isinstance(header, pb.AttachResponse):
            header.chunk.count = self._values.size
        return whole_message(header, self._values)


class ChunkReplyWriter(SharedReplyWriter):
    """Makes one message a chunk, each computed straight into it; see `ReplyWriter`."""

    def __init__(self, request: StepRequest, send: Callable[[bytes], object]) -> None:
        """Hand complete messages to `send`."""
        self._request = request
        self._send = [send]
        self.form = (ChunkReplyWriter, request.reply_dtype, request.reply_elements, request.reply_first)
        self._unfinished: deque[_Chunk] = deque()

    def alone(self) -> ChunkReplyWriter:
        """See `SharedReplyWriter`."""
        return ChunkReplyWriter(self._request, self._send[0])

    def follow(self, leader: ReplyWriter) -> None:
        """See `SharedReplyWriter`."""
        assert isinstance(leader, ChunkReplyWriter)
        leader._send += self._send

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplyWriter`."""
        self._unfinished.append(_Chunk(offset, count, self._request))
        return self._unfinished[-1].values

    def rows(self, offset: int, rows: HostArray, width: int) -> HostArray:
        """See `ReplyWriter`."""
        self._unfinished.append(_Chunk(offset, len(rows) * width, self._request, rows))
        return self._unfinished[-1].values

    def before(self) -> HostArray:
        """See `ReplyWriter`."""
        chunk = self._unfinished[-1]
        chunk.before = np.empty_like(chunk.values)
        return chunk.before

    def flush(self) -> None:
        """See `ReplyWriter`."""
        if (message := self._unfinished.popleft().message()) is not None:
            for send in self._send:
                send(message)


class _Chunk:
    """One chunk of a reply in the making."""

    def __init__(self, offset: int, count: int, request: StepRequest, rows: HostArray | None = None) -> None:
        self._chunk = tensor_pb2.Chunk(offset=offset, count=count, rows=None if rows is None else rows.tolist())
        self._frame = FrameBuffer(pb.AttachResponse(chunk=self._chunk), count * request.reply_dtype.itemsize)
        self.values = self._frame.payload(request.reply_dtype)
        self.before: HostArray | None = None

    def message(self) -> bytes | None:
        """Return the whole chunk, or a patch where that is smaller; None where nothing changed."""
        if self.before is None:
            return self._frame.finish()
        before, after = self.before.view(np.uint16), self.values.view(np.uint16)
        if np.array_equal(before, after):
            return None
        if (patch := encode_patch(before, after)) is None:
            return self._frame.finish()
        self._chunk.patch = True
        return pb.AttachResponse(chunk=self._chunk, payload=patch).SerializeToString()
