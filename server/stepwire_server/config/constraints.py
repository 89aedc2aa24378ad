"""The constraints of settings: their types and units, for flags and errors too."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

__all__ = ["BYTES", "KIB", "MIB", "Count", "Positive", "Seconds", "text"]

KIB = 1 << 10
MIB = 1 << 20

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
# In every source a size may also be text such as 8G or 512MiB; see `parse_bytes`.
BYTES = Meta(extra={"unit": "bytes"})
# Thirty years at most: dates and waits end before infinity.
Seconds = Annotated[float, Meta(gt=0, le=1e9, extra={"unit": "seconds"})]


def text(allowed: str, pattern: str) -> Meta:
    """Return the constraint of a text: its pattern, and the same in words for the error."""
    return Meta(pattern=pattern, extra={"allowed": allowed})
