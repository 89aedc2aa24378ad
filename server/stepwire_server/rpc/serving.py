"""The parts of a server that every stream and call uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from stepwire_server.access.control import AccessControl
from stepwire_server.records.replied import RepliedSink
from stepwire_server.rpc.drain import Drain
from stepwire_server.rpc.lane_gate import LaneGate

__all__ = ["Serving"]


class Serving(NamedTuple):
    """The parts of a server that every stream and call uses.

    Attributes:
        drain: the steps under way, and the refusal of new ones at the end of the server.
        commit_threads: threads that commits of large steps run in.
        clock: returns seconds.
        max_chunk_bytes: the most bytes of one chunk's payload.
        access: the admission of calls.
        reply_sinks: are told of each reply.
        not_serving: returns the reason why the server serves no sessions; empty where it does.
        lanes: the gate of compiled lanes.
        most_reply_bytes: the most bytes of a reply's payload in one message, whatever its client asks for.
    """

    drain: Drain
    commit_threads: Executor
    clock: Callable[[], float]
    max_chunk_bytes: int
    access: AccessControl
    reply_sinks: Sequence[RepliedSink] = ()
    not_serving: Callable[[], str] = lambda: ""
    lanes: LaneGate = LaneGate(enabled=False)
    most_reply_bytes: int = sys.maxsize
