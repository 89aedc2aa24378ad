"""stepwire over every transport and in every encoding, beside the floors, at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import contest
import floors
import variants
from contest import Contender, Ratios
from echo import EchoTargets
from sockets import Addresses

__all__ = ["RATIOS", "contenders", "section_name", "transports"]

_PUSH_PULL = ("raw gRPC push, pull", floors.ENGINE, floors.COPIES)
_DUPLEX = ("raw gRPC duplex", floors.ENGINE, floors.COPIES)
RATIOS: Ratios = {
    "tcp to its parts": ("tcp", _PUSH_PULL),
    "tcp overlap to its parts": ("tcp overlap", _DUPLEX),
    "uds to its parts": ("uds", ("raw gRPC push, pull, Unix socket", floors.ENGINE, floors.COPIES)),
    "uds overlap to its parts": ("uds overlap", ("raw gRPC duplex, Unix socket", floors.ENGINE, floors.COPIES)),
    "uds to tcp": ("uds", ("tcp",)),
    "shm to tcp": ("shm", ("tcp",)),
    "shm in place to tcp": ("shm in place", ("tcp",)),
    "shm in place to engine": ("shm in place", (floors.ENGINE,)),
    "overlap to tcp": ("tcp overlap", ("tcp",)),
    "bfloat16 to tcp": ("tcp bfloat16", ("tcp",)),
    "bfloat16 of float32 arrays to tcp": ("tcp bfloat16 of float32 arrays", ("tcp",)),
    "int8 up, bfloat16 down to tcp": ("tcp int8 up, bfloat16 down", ("tcp",)),
    "no reply to tcp": ("tcp no reply", ("tcp",)),
    "changes only to bfloat16": ("tcp bfloat16, changes only", ("tcp bfloat16",)),
    "2 servers to tcp": ("tcp 2 servers", ("tcp",)),
}


def contenders(targets: Sequence[str], echo: EchoTargets, sockets: Addresses) -> list[Contender]:
    """Return the floors and every variant."""
    return [
        *floors.socket_floors(sockets),
        *floors.grpc_floors(echo),
        *floors.parts(),
        *(variants.contender(variant, targets) for variant in variants.VARIANTS),
    ]


def transports(entrants: Sequence[Contender], *, size: int, rounds: int) -> dict[str, Any]:
    """Run the contest at one size and return its figures."""
    result = contest.run_contest(entrants, size, rounds=rounds, batch=contest.batch_of(size))
    return result.figures() | result.ratios(RATIOS)


def section_name(kind: str, size: int) -> str:
    """Return the name of a contest at a size: `section_name("transports", 32_000_000)` is "transports 32M"."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if size % unit == 0:
            return f"{kind} {size // unit}{letter}"
    return f"{kind} {size}"
