"""The client of several servers, each of which holds a part of every session."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from stepwire.arrays.packing import Arrays
from stepwire.arrays.trees import Flattened, Structure, structure_like
from stepwire.client import Client
from stepwire.errors import InvalidRequestError
from stepwire.layout import place
from stepwire.results import ServerInfo, SessionInfo
from stepwire.sharding.fan_out import FanOut
from stepwire.sharding.partition import Partition
from stepwire.sharding.session import ShardedSession
from stepwire.sharding.shard import Shard
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.wire.messages import layout_from_wire, spec_from_wire, spec_to_wire

__all__ = ["ShardedClient"]

_T = TypeVar("_T")

_LAYERWISE: Final = (optimizer_pb2.RULE_LAMB, optimizer_pb2.RULE_LARS)


class ShardedClient(Client):
    """Connections to several servers, or several to one: sessions are cut over them, and stepped by all in parallel.

    Made by `stepwire.connect` from several targets, or with `channels`. Used as a `Client` is; it makes
    `ShardedSession`s. A model that is too small to be cut for all targets lies on the first ones.
    """

    def __init__(self, clients: Sequence[Client]) -> None:
        """Use clients of one server each, which are closed with this one."""
        self._clients = tuple(clients)

    @property
    def target(self) -> str:
        """Where it connects to: all targets, joined by commas."""
        return ",".join(client.target for client in self._clients)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the servers what they are and can do.

        Returns:
            What all of them can do: the features that all serve, the protocols that all speak, the least of the limits.
            Devices are those of all, as `"host:port cuda:0"`; versions and instances are joined by commas.

        Raises:
            UnavailableError: one cannot be reached.
        """
        parts = self._each([functools.partial(client.info, timeout=timeout) for client in self._clients])
        targets = [client.target for client in self._clients]
        return ServerInfo(
            version=",".join(dict.fromkeys(part.version for part in parts)),
            protocol_min=max(part.protocol_min for part in parts),
            protocol_max=min(part.protocol_max for part in parts),
            instance_id=",".join(dict.fromkeys(part.instance_id for part in parts)),
            devices={
                f"{target} {name}": device
                for target, part in zip(targets, parts, strict=True)
                for name, device in part.devices.items()
            },
            features=tuple(sorted(set.intersection(*(set(part.features) for part in parts)))),
            sessions=sum({part.instance_id: part.sessions for part in parts}.values()),
            max_chunk_bytes=min(part.max_chunk_bytes for part in parts),
            draining=any(part.draining for part in parts),
        )

    def session(
        self,
        session_id: str | Sequence[str],
        *,
        like: Arrays | None = None,
        error_feedback: bool = False,
        timeout: float | None = None,
    ) -> ShardedSession:
        """Return a session that exists; its first step or load takes the slots and fences who held them.

        Args:
            session_id: `ShardedSession.session_id`, or the ids in it. The servers must be those that it was made on, in
                the same order.
            like: as for `Client.session`.
            error_feedback: as for `create_session`; starts with nothing kept.
            timeout: seconds.

        Raises:
            InvalidRequestError: these are not the shards of one model.
            SessionNotFoundError: a shard does not exist.
            UnavailableError: a server cannot be reached.
        """
        ids = session_id.split(",") if isinstance(session_id, str) else list(session_id)
        if not 1 <= len(ids) <= len(self._clients):
            raise InvalidRequestError(
                f"session_id: {len(ids)} ids for {len(self._clients)} targets; give the ids of all shards, in order",
                metadata={"field": "session_id"},
            )
        structure = structure_like(like)
        found: list[Shard] = self._each(
            [
                functools.partial(
                    client._find, Shard, each, timeout, structure=Structure(), error_feedback=error_feedback
                )
                for client, each in zip(self._clients, ids, strict=False)
            ]
        )
        partition = Partition.read([layout_from_wire(shard.message.layout) for shard in found])
        return ShardedSession(found, partition, structure=structure)

    def sessions(self, *, timeout: float | None = None) -> Iterator[SessionInfo]:
        """Yield the servers' sessions one by one, shards of sharded ones included, server after server.

        Raises:
            UnavailableError: a server cannot be reached.
        """
        by_target = {client.target: client for client in self._clients}
        return itertools.chain.from_iterable(client.sessions(timeout=timeout) for client in by_target.values())

    def close(self) -> None:
        """Close the connections; sessions stay on the servers until their leases run out."""
        for client in self._clients:
            client.close()

    def _create(
        self,
        config: session_pb2.SessionConfig,
        parameters: Flattened,
        request_id: str | None,
        timeout: float | None,
        *,
        error_feedback: bool,
    ) -> ShardedSession:
        partition = _partition(config, len(self._clients))
        configs = _configs(config, partition)
        made: list[Shard] = []

        def create(rank: int) -> Shard:
            own_id = None if request_id is None else f"{request_id}.{rank}"
            shard, _ = self._clients[rank]._make(
                Shard, configs[rank], own_id, timeout, structure=Structure(), error_feedback=error_feedback
            )
            made.append(shard)
            return shard

        try:
            shards = self._each([functools.partial(create, rank) for rank in range(len(configs))])
            session = ShardedSession(shards, partition, structure=parameters.structure)
            session.load_missing(parameters.named, timeout)
        except BaseException:
            if request_id is None:  # nobody else knows the sessions, so nobody would end them
                for shard in made:
                    shard.close()
            raise
        return session

    def _each(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        fan_out = FanOut(len(calls))
        try:
            return fan_out.each(calls)
        finally:
            fan_out.close()


def _partition(config: session_pb2.SessionConfig, most: int) -> Partition:
    """Cut a model for at most so many servers.

    Raises:
        InvalidRequestError: what it asks for cannot be had from several servers.
    """
    in_blocks = config.state_precision == session_pb2.STATE_PRECISION_INT8_MOMENTS
    layout = place([spec_from_wire(tensor) for tensor in config.tensors], len(config.groups), in_blocks=in_blocks)
    partition = Partition.make(layout, most, within_tensors=config.optimizer.rule not in _LAYERWISE)
    keeps = config.gradient.missing_gradient == optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP
    if len(partition.shares) > 1 and keeps and any(group.HasField("schedule") for group in config.groups):
        raise InvalidRequestError(
            "schedule: it counts the updates of a whole group, and with missing_gradient 'keep' a server sees only "
            "those of its part; send the learning rate with each step",
            metadata={"field": "schedule"},
        )
    return partition


def _configs(config: session_pb2.SessionConfig, partition: Partition) -> list[session_pb2.SessionConfig]:
    """Return the config of each shard's session: the whole's, with other tensors, decided together where need be."""
    gradient = config.gradient
    decides = (
        gradient.HasField("clip_grad_norm")
        or any(group.HasField("clip_grad_norm") for group in config.groups)
        or gradient.non_finite != optimizer_pb2.NON_FINITE_POLICY_ALLOW
        or gradient.HasField("loss_scaling")
    )
    configs = []
    for rank in range(len(partition.shares)):
        own = session_pb2.SessionConfig()
        own.CopyFrom(config)
        del own.tensors[:]
        own.tensors.extend(map(spec_to_wire, partition.specs(rank)))
        own.gradient.two_phase = decides and len(partition.shares) > 1
        configs.append(own)
    return configs
