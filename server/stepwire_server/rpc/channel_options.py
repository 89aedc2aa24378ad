"""The arguments of gRPC's server: sizes of messages, and the signs of life of connections."""

from __future__ import annotations

from typing import Final

from stepwire.wire.channel_options import BULK_OPTIONS, LARGEST_REQUEST_BYTES
from stepwire_server.config import MIB, ServerConfig

__all__ = ["channel_options", "largest_message_bytes"]

_MESSAGE_HEADROOM: Final = 1 * MIB
_MOST_CONNECTIONS: Final = 8192
_KEEPALIVE_MS: Final = 60_000
_KEEPALIVE_TIMEOUT_MS: Final = 20_000
"""A host that has vanished is noticed after both together."""
_IDENTITY_ALONE: Final = 1
"""No message is inflated: a kilobyte may be a megabyte, before anybody has counted it. Gradients are hardly smaller."""


def largest_message_bytes(config: ServerConfig) -> int:
    """Return the bytes of the largest message that is received.

    gRPC has one limit for all methods. It keeps a message until the last byte of it is there, and tells nobody of the
    bytes before: so a call that waits for its message may hold as many.
    """
    return max(config.max_chunk_bytes + _MESSAGE_HEADROOM, LARGEST_REQUEST_BYTES)


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the arguments of gRPC's server."""
    return [
        *BULK_OPTIONS,
        ("grpc.max_receive_message_length", largest_message_bytes(config)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ALONE),
        ("grpc.per_message_decompression", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_allowed_incoming_connections", _MOST_CONNECTIONS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
