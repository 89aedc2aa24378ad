"""The handoff of memory by a server on this host: one request over its Unix socket, one response with descriptors.

The connection stays open for as long as the memory is used: its end tells the server.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from stepwire.errors import StepwireError, UnavailableError
from stepwire.v1 import transport_pb2
from stepwire.wire.error_details import error_from_details
from stepwire.wire.handoff_proof import handoff_proof

__all__ = ["Handed", "bound_waits", "handed_over"]

_LARGEST_RESPONSE: Final = 16 << 10
_MOST_SECONDS: Final = 5.0
_LONGEST_SECONDS: Final = 1 << 30


class Handed(NamedTuple):
    """The handoff that came.

    Attributes:
        connection: the connection, which its keeper closes.
        response: the response, which is no refusal.
        descriptors: the expected number of descriptors, closed on exec.
    """

    connection: socket.socket
    response: transport_pb2.HandoffResponse
    descriptors: list[int]


@contextlib.contextmanager
def handed_over(
    handoff: transport_pb2.Handoff, timeout_seconds: float, descriptors: int, access_token: str = ""
) -> Iterator[Handed]:
    """Fetch the memory of a token for a block. The descriptors are closed after the block, the connection if it fails.

    Args:
        handoff: the handoff of `AttachOpened`.
        timeout_seconds: the time for everything; at most some seconds are used.
        descriptors: the expected number of descriptors.
        access_token: the token that the stream was attached with; empty for none.

    Raises:
        StepwireError: the server refused, cannot be reached, or sent something else than it says.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received: list[int] = []
    try:
        bound_waits(connection, max(min(timeout_seconds, _MOST_SECONDS), 1e-3))
        response = _ask(connection, handoff, access_token, received, descriptors)
        yield Handed(connection, response, received)
    except OSError as problem:
        connection.close()
        raise UnavailableError(f"shared memory cannot be fetched from {handoff.socket}: {problem}") from None
    except BaseException:
        connection.close()
        raise
    finally:
        for descriptor in received:
            os.close(descriptor)


def bound_waits(connection: socket.socket, seconds: float) -> None:
    """Let the kernel bound each wait: Python's own timeouts fail at once where the server has yet to accept others.

    A wait that is over raises BlockingIOError. The bound is at least a microsecond, since 0 would be none.
    """
    whole = int(min(seconds, _LONGEST_SECONDS))
    moment = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6) if whole < _LONGEST_SECONDS else 0, not whole))
    for direction in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, direction, moment)


def _ask(
    connection: socket.socket, handoff: transport_pb2.Handoff, access_token: str, received: list[int], wanted: int
) -> transport_pb2.HandoffResponse:
    """Send the token and return the response; all its descriptors are put into `received`, also those of a refusal."""
    request = transport_pb2.HandoffRequest(token=handoff.token, proof=handoff_proof(access_token, handoff.token))
    connection.connect(handoff.socket)
    connection.send(request.SerializeToString())
    data, came, _, _ = socket.recv_fds(connection, _LARGEST_RESPONSE, wanted, socket.MSG_CMSG_CLOEXEC)
    received += came
    if not data and not came:
        raise UnavailableError(f"the server closed the connection to {handoff.socket} without a response")
    response = _response(data)
    if response.HasField("refused"):
        raise _error(response)
    if len(came) != wanted:
        raise UnavailableError(f"{len(came)} descriptors came with the shared memory instead of {wanted}")
    return response


def _response(data: bytes) -> transport_pb2.HandoffResponse:
    try:
        return transport_pb2.HandoffResponse.FromString(data)
    except DecodeError:
        raise UnavailableError(f"{len(data)} bytes that came with the shared memory are no response") from None


def _error(response: transport_pb2.HandoffResponse) -> StepwireError:
    try:
        return error_from_details(response.refused)
    except DecodeError:
        return UnavailableError(f"shared memory was refused: {response.refused.message}")
