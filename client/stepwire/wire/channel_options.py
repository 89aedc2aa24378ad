"""gRPC channel settings that both ends share, each with its reason."""

from __future__ import annotations

from typing import Final

__all__ = ["BULK_OPTIONS", "chunk_bytes_for"]

# The flow-control window is pinned: with the probe on, gRPC grows it over many round trips and shrinks it when the
# reader pauses, as ours does between receiving a gradient and sending the answer. Probe, window and frame size only
# take effect together. `make bench`, section "messages", measures them against others, and the size of messages; every
# echo that a step is compared with runs under the same ones.
BULK_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
)

_LEAST_CHUNK_BYTES: Final = 512 << 10
_MOST_CHUNK_BYTES: Final = 4 << 20
_CHUNKS: Final = 8


def chunk_bytes_for(total_bytes: int, limit_bytes: int) -> int:
    """Return how large the messages of a model are to be: 512 KiB to 4 MiB, a power of two, at most the server's limit.

    Large messages cost the least a byte (`make bench`, section "messages"). But while one is on the wire, the one
    before is summed up or unpacked and the next is packed, so a model of a few megabytes is sent in about eight.
    """
    wanted = 1 << max(total_bytes // _CHUNKS - 1, 0).bit_length()
    return min(max(wanted, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES, limit_bytes)
