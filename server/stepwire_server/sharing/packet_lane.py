"""The packet lane of one stream: a pair of sockets for messages that need no gRPC.

One end is handed to the client with its memory. The socket keeps the borders of messages and their order, and tells
when the peer is gone. A thread that waits for a message waits in the kernel. `end` wakes it, from any thread.

The kernel bounds what a client can leave unread or unsent: the buffer of a socket. Descriptors that a client sends
along are closed by the kernel, since nothing here asks for them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Final

import numpy as np

from stepwire.wire.packets import REQUEST_BYTES, SEND_BUFFER_BYTES
from stepwire_server.engines.cpu.lane_loop import LaneLoop, Seat

__all__ = ["PacketLane"]

_FLAGS: Final = getattr(socket, "MSG_NOSIGNAL", 0)
_SEND_SECONDS: Final = 5
"""The longest wait for room in the buffer of the socket, which the reply to a small step fits into."""


class PacketLane:
    """Both ends of a lane until the client's first message, and the server's from then on.

    One thread receives and sends; any thread ends. Closes twice without complaint.
    """

    def __init__(self) -> None:
        """Make the pair.

        Raises:
            OSError: the system has no descriptors left, or no such sockets.
        """
        self._end, self._handed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self._end, self._handed):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0))
        self._received = np.empty(REQUEST_BYTES + 1, np.uint8).data  # whose pages exist from their first use on
        self._is_fetched = False
        self._lock = threading.Lock()  # no descriptor is shut down after its number belongs to another socket

    @property
    def descriptor(self) -> int:
        """The descriptor of the client's end."""
        return self._handed.fileno()

    def seated(self, loop: LaneLoop) -> Seat | None:
        """Give the server's end a place in a loop of compiled lanes; None where there is none left.

        Raises:
            OSError: the system has no descriptors left.
        """
        return loop.seat(self._end)

    def receive(self) -> bytes:
        """Wait for a message and return it; one byte more than `REQUEST_BYTES` for a longer one, nothing at the end."""
        try:
            count = self._end.recv_into(self._received)
        except OSError:  # the client left messages unread, or the lane is closed
            return b""
        if not self._is_fetched:  # the client has its end, and with it alone the lane ends
            self._is_fetched = True
            self._handed.close()
        return bytes(self._received[:count])

    def send(self, message: bytes) -> bool:
        """Send a message, and tell whether the client is there. One that leaves many replies unread ends the lane."""
        try:
            self._end.send(message, _FLAGS)
        except OSError:
            self.end()
            return False
        return True

    def end(self) -> None:
        """End the lane: whoever waits on it, on either side, goes on. Messages on their way arrive."""
        with self._lock, contextlib.suppress(OSError):  # it is closed, or the client's end is
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the lane, and close what is open of it."""
        self.end()
        with self._lock:
            self._end.close()
        self._handed.close()
