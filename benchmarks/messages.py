"""How large messages should be, and how gRPC should be set: raw push and pull of the same bytes, sent differently.

`stepwire.wire.channel_options` and the client's chunk size were chosen from these figures.
"""

from __future__ import annotations

import contextlib
from typing import Any

import contest
from contest import Action, Contender, Ratios
from echo import EchoStream, Options, bulk_messages, echo_process
from stepwire.wire.channel_options import BULK_OPTIONS
from stepwire.wire.dtypes import FLOAT32

__all__ = ["messages"]

_OURS = "ours, 4 MiB"
_SIZES = {"64 KiB": 64 << 10, "256 KiB": 256 << 10, "1 MiB": 1 << 20, "2 MiB": 2 << 20, "8 MiB": 8 << 20}


def messages(*, size: int, rounds: int) -> dict[str, Any]:
    """Move `size` float32 up and as many down in each way; return the times and their ratios to ours."""
    result = contest.run_contest(_contenders(), size, rounds=rounds, batch=contest.batch_of(size))
    ratios: Ratios = {f"{name} to ours": (name, (_OURS,)) for name in result.times if name != _OURS}
    return result.figures() | result.ratios(ratios)


def _contenders() -> list[Contender]:
    window, frame = _with("grpc.http2.lookahead_bytes"), _with("grpc.http2.max_frame_size")
    return [
        _contender(_OURS, 4 << 20, BULK_OPTIONS),
        *(_contender(name, chunk_bytes, BULK_OPTIONS) for name, chunk_bytes in _SIZES.items()),
        _contender("4 MiB, gRPC's own settings", 4 << 20, ()),
        _contender("4 MiB, window 1 MiB", 4 << 20, window(1 << 20)),
        _contender("4 MiB, window 32 MiB", 4 << 20, window(32 << 20)),
        _contender("4 MiB, frames of 16 KiB", 4 << 20, frame(16 << 10)),
        _contender("4 MiB, frames of 4 MiB", 4 << 20, frame(4 << 20)),
    ]


def _with(name: str) -> Any:
    return lambda value: tuple((other, value if other == name else own) for other, own in BULK_OPTIONS)


def _contender(name: str, chunk_bytes: int, options: Options) -> Contender:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        target = stack.enter_context(echo_process(options)).tcp
        stream = stack.enter_context(contextlib.closing(EchoStream(target, "PushPull", options)))
        bodies = bulk_messages(size * FLOAT32.itemsize, chunk_bytes)
        return lambda: stream.exchange(bodies)

    return Contender(name, prepare)
