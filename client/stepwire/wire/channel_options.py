"""The gRPC channel options of client and server, each with its reason."""

from __future__ import annotations

from typing import Final

__all__ = ["BULK_OPTIONS", "LARGEST_REQUEST_BYTES", "chunk_bytes_for"]

# The flow-control window is fixed. With the probe on, gRPC grows the window over many round trips. It shrinks the
# window when the reader pauses, as a server does between a gradient and its reply. Probe, window and frame size work
# together. `make bench`, section "messages", compares them with other values, and with other sizes of messages. Every
# echo in a comparison with a step runs under the same options.
BULK_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
)

LARGEST_REQUEST_BYTES: Final = 8 << 20
"""The largest message of a call that carries no chunk, such as the description of a session."""

_LEAST_CHUNK_BYTES: Final = 512 << 10
_MOST_CHUNK_BYTES: Final = 4 << 20
_CHUNKS: Final = 8


def chunk_bytes_for(total_bytes: int, limit_bytes: int) -> int:
    """Return the size of a model's messages: a power of two from 512 KiB to 4 MiB, at most the server's limit.

    Large messages cost the least for each byte (`make bench`, section "messages"). But during the transfer of one
    message, the message before is summed or unpacked and the next is packed. So a model of a few megabytes is sent in
    about eight messages.

    Args:
        total_bytes: the size of the model on the wire.
        limit_bytes: the server's limit for a message.

    Returns:
        The size of a message in bytes.
    """
    wanted = 1 << max(total_bytes // _CHUNKS - 1, 0).bit_length()
    return min(max(wanted, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES, limit_bytes)
