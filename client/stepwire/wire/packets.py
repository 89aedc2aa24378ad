"""The bounds of a packet lane that both ends have: of its datagrams, see `transport.proto`, and of waiting awake."""

from __future__ import annotations

from typing import Final

__all__ = [
    "MOST_SPIN_MICROSECONDS",
    "PAYLOAD_BYTES",
    "REPLY_BYTES",
    "REQUEST_BYTES",
    "SEND_BUFFER_BYTES",
    "SPIN_MISSES",
    "SPIN_REST",
]

PAYLOAD_BYTES: Final = 64 << 10
"""The most bytes of the payload of a message, each way."""

REQUEST_BYTES: Final = PAYLOAD_BYTES + (4 << 10)
"""The most bytes of a message to the server."""

REPLY_BYTES: Final = PAYLOAD_BYTES + (192 << 10)
"""The most bytes of a message to the client."""

SEND_BUFFER_BYTES: Final = 2 * REPLY_BYTES
"""The buffer of a sender, which a datagram has to fit into with the kernel's own data about it."""

MOST_SPIN_MICROSECONDS: Final = 50
"""The longest moment that an end waits awake for a datagram."""

SPIN_MISSES: Final = 4
"""The moments in vain, one after the other, before a rest."""

SPIN_REST: Final = 256
"""The waits of a rest, which have no such moment."""
