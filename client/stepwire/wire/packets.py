"""The sizes of the datagrams on a packet lane; see `transport.proto`."""

from __future__ import annotations

from typing import Final

__all__ = ["PAYLOAD_BYTES", "REPLY_BYTES", "REQUEST_BYTES", "SEND_BUFFER_BYTES"]

PAYLOAD_BYTES: Final = 64 << 10
"""The most bytes of the payload of a message, each way."""

REQUEST_BYTES: Final = PAYLOAD_BYTES + (4 << 10)
"""The most bytes of a message to the server."""

REPLY_BYTES: Final = PAYLOAD_BYTES + (192 << 10)
"""The most bytes of a message to the client."""

SEND_BUFFER_BYTES: Final = 2 * REPLY_BYTES
"""The buffer of a sender, which a datagram has to fit into with the kernel's own data about it."""
