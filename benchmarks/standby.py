"""The step of a session whose standby acknowledges it, beside the step alone and one more push of its gradient.

A standby receives the gradient while the primary does. With a network of its own it would cost a round trip. Here the
processors and the loopback are shared, so the goal is a bound over the larger of the step and one more raw push.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Final, NamedTuple

import grpc
import numpy as np

import stepwire
from echo import EchoStream, echo_process, sized_message
from stepwire.v1 import replication_service_pb2 as pb
from stepwire_server.processes.spawn import server_process
from timing import times_of

__all__ = ["REPLICATED_GOAL", "Scale", "standby"]

Figures = dict[str, Any]

REPLICATED_GOAL: Final = "replicated step to the larger of its step and a push"
_LOOK_SECONDS: Final = 0.01
_BYTES: Final = 4
_CHUNK_BYTES: Final = 4 << 20
_SMALL_BYTES: Final = 64
"""The reply to a message of a push."""


class Scale(NamedTuple):
    """The parameters of the model, and the rounds."""

    parameters: int = 32_000_000
    rounds: int = 9

    @classmethod
    def quick(cls) -> Scale:
        """Return a short form, for checking the benchmark."""
        return cls(50_000, 2)


def standby(scale: Scale) -> Figures:
    """Measure a replicated step, the same step in memory, and a raw push, in turns."""
    gradient = {"w": np.full(scale.parameters, 0.01, np.float32)}
    out = {"w": np.empty(scale.parameters, np.float32)}
    messages = [sized_message(_CHUNK_BYTES, _SMALL_BYTES)] * -(-scale.parameters * _BYTES // _CHUNK_BYTES)
    times: dict[str, list[float]] = {"replicated": [], "memory": [], "push": []}
    with (
        echo_process() as echo,
        server_process("--device", "cpu", "--standby", "required") as primary,
        server_process("--device", "cpu", "--standby-of", primary.target),
        stepwire.connect(primary.target, transport="tcp") as client,
    ):
        _await_standby(primary.target)
        raw = EchoStream(echo.tcp, "Echo")
        with (
            client.create_session(gradient, durability="replicated") as replicated,
            client.create_session(gradient) as memory,
        ):
            actions = {
                "replicated": lambda: replicated.step(gradient, out=out),
                "memory": lambda: memory.step(gradient, out=out),
                "push": lambda: raw.exchange(messages),
            }
            for action in actions.values():
                action()
            for _ in range(scale.rounds):
                for name, action in actions.items():
                    times[name] += times_of(action, 1)
        raw.close()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "parameters": scale.parameters,
        "rounds": scale.rounds,
        **{f"{name} ms": seconds * 1e3 for name, seconds in medians.items()},
        REPLICATED_GOAL: medians["replicated"] / max(medians["memory"], medians["push"]),
    }


def _await_standby(target: str) -> None:
    """Wait until the standby of a server has all."""
    with grpc.insecure_channel(target) as channel:
        ask: Any = channel.unary_unary(
            "/stepwire.v1.ReplicationService/GetReplication",
            request_serializer=pb.GetReplicationRequest.SerializeToString,
            response_deserializer=pb.GetReplicationResponse.FromString,
        )
        while not ask(pb.GetReplicationRequest()).in_sync:
            time.sleep(_LOOK_SECONDS)
