"""The digest of a session at one moment, alike on primary and standby where all numbers and arrays are."""

from __future__ import annotations

import hashlib

import msgspec

from stepwire_server.durability.records import chained
from stepwire_server.sessions.exchange import Captured

__all__ = ["digest_of"]


def digest_of(captured: Captured) -> bytes:
    """Return the SHA-256 of a moment's numbers and of the CRC32C of each block of its arrays.

    Blocks come in any order, so they are sorted by slot and first element.
    """
    numbers = captured.numbers
    blocks = sorted((slot, start, chained(0, values)) for slot, start, values in captured.blocks)
    told = (
        numbers.step,
        numbers.load,
        tuple(numbers.tensor_steps),
        tuple(numbers.tensor_scalars),
        numbers.loss_scale and tuple(numbers.loss_scale),
        captured.ready,
        blocks,
    )
    return hashlib.sha256(msgspec.msgpack.encode(told)).digest()
