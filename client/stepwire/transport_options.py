"""gRPC channel settings that both ends share, each with its reason."""

from __future__ import annotations

from typing import Final

__all__ = ["BULK_OPTIONS"]

# The flow-control window is pinned: with the probe on, gRPC grows it over many round trips and shrinks it when the
# reader pauses, as ours does between receiving a gradient and sending the answer. Probe, window and frame size only
# take effect together. `make bench`, section "messages", measures them against others, and the size of messages; every
# echo that a step is compared with runs under the same ones.
BULK_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
)
