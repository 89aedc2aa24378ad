"""The layer that knows gRPC: messages, streams, refusals and statuses."""

from __future__ import annotations

__all__: list[str] = []
