"""The bytes of the contract: dtypes, frames, patches, addresses and error details. Shared with the server."""

from __future__ import annotations

__all__: list[str] = []
