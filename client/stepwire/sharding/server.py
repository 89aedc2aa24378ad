"""The link to several servers, each of which holds a shard of every session."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from stepwire.connection.errands import undelivered
from stepwire.connection.watch import Closable
from stepwire.errors import InvalidRequestError, SessionNotFoundError, StepMismatchError
from stepwire.layout import place
from stepwire.links.remote import RemoteLink
from stepwire.links.server import LinkOptions, RemoteServer, ServerLink
from stepwire.results import ServerInfo, SessionInfo
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.link import ShardedLink
from stepwire.sharding.partition import Partition
from stepwire.sharding.refusals import rows_by_ids
from stepwire.statistics import Statistics
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.messages import spec_to_wire, specs_from_wire

__all__ = ["ShardedServer"]

_T = TypeVar("_T")

_LAYERWISE: Final = (optimizer_pb2.RULE_LAMB, optimizer_pb2.RULE_LARS)


class ShardedServer(ServerLink):
    """Links to several servers, or several links to one: sessions are partitioned over them, and stepped in parallel.

    A model that is too small to be cut for all targets lies on the first ones.
    """

    def __init__(self, servers: Sequence[RemoteServer]) -> None:
        """Use the links of one server each, which are closed with this one."""
        self._servers = tuple(servers)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of all servers, in order."""
        return tuple(target for server in self._servers for target in server.targets)

    def info(self, timeout: float | None) -> ServerInfo:
        """Ask the servers for their properties.

        Returns:
            The features that all serve, the protocols that all speak, the least of the limits. Devices are those of
            all, as `"host:port cuda:0"`; versions and instances are joined by commas.

        Raises:
            UnavailableError: a server cannot be reached.
        """
        infos = fan_out([functools.partial(server.info, timeout) for server in self._servers])
        return ServerInfo(
            version=",".join(dict.fromkeys(info.version for info in infos)),
            protocol_min=max(info.protocol_min for info in infos),
            protocol_max=min(info.protocol_max for info in infos),
            instance_id=",".join(dict.fromkeys(info.instance_id for info in infos)),
            devices={
                f"{target} {name}": device
                for target, info in zip(self.targets, infos, strict=True)
                for name, device in info.devices.items()
            },
            features=tuple(sorted(set.intersection(*(set(info.features) for info in infos)))),
            sessions=sum({info.instance_id: info.sessions for info in infos}.values()),
            max_chunk_bytes=min(info.max_chunk_bytes for info in infos),
            draining=any(info.draining for info in infos),
            not_serving="; ".join(info.not_serving for info in infos if info.not_serving),
        )

    def create(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> ShardedLink:
        """See `ServerLink.create`; each shard's request has an id of its own, made from `request_id`."""
        _check_worker(options)
        partition = _partition(config, len(self._servers))
        configs = _configs(config, partition)

        def create(rank: int) -> RemoteLink:
            own_id = None if request_id is None else f"{request_id}.{rank}"
            link = self._servers[rank].create(configs[rank], own_id, timeout, options)
            if request_id is None:  # nobody else knows the session, so nobody would end it
                undelivered(link.close)
            return link

        return ShardedLink(fan_out([functools.partial(create, rank) for rank in range(len(configs))]), partition)

    def find(self, session_id: str, timeout: float | None, options: LinkOptions) -> ShardedLink:
        """Return the link to a sharded session.

        Args:
            session_id: the ids of all shards in order, joined by commas. The servers must be those that the session was
                created on, in the same order.
            timeout: seconds.
            options: as for `create`; error feedback starts with nothing kept.

        Raises:
            InvalidRequestError: these are not the shards of one model.
            SessionNotFoundError: a shard does not exist.
            UnavailableError: a server cannot be reached.
        """
        _check_worker(options)
        ids = session_id.split(",") if session_id else []
        if not 1 <= len(ids) <= len(self._servers):
            raise InvalidRequestError.of(
                "session_id",
                f"{len(ids)} ids for {len(self._servers)} targets; give the ids of all shards, in their order",
            )

        def find(rank: int, own_id: str) -> RemoteLink:
            return self._at_holder(rank, own_id, lambda server: server.find(own_id, timeout, options))

        links = fan_out([functools.partial(find, *each) for each in enumerate(ids)])
        return ShardedLink(links, Partition.read([link.description.packer.layout for link in links]))

    def _at_holder(self, rank: int, session_id: str, call: Callable[[RemoteServer], _T]) -> _T:
        """Call the server of a shard: an id is one shard's, wherever its server stands among the targets.

        Raises:
            SessionNotFoundError: no server has it.
            StepwireError: as the call.
        """
        others = [server for server in self._servers if server is not self._servers[rank]]
        for server in (self._servers[rank], *others):
            with contextlib.suppress(SessionNotFoundError):
                return call(server)
        raise SessionNotFoundError(
            f"session {session_id!r} is on none of the servers {', '.join(self.targets)}; it has ended, or its server "
            "is not among these targets"
        )

    def fork(
        self, session_id: str, request: pb.ForkSessionRequest, timeout: float | None, *, error_feedback: bool
    ) -> ShardedLink:
        """Fork every shard; see `ServerLink.fork`. Forks of some shards alone end, unless the request has an id.

        Raises:
            StepMismatchError: the shards are at different steps.
            StepwireError: the refusal of a server.
        """
        made: list[RemoteLink] = []

        def fork(rank: int, own_id: str) -> RemoteLink:
            own = pb.ForkSessionRequest()
            own.CopyFrom(request)
            own.request_id = request.request_id and f"{request.request_id}.{rank}"
            link = self._at_holder(
                rank, own_id, lambda server: server.fork(own_id, own, timeout, error_feedback=error_feedback)
            )
            made.append(link)
            return link

        try:
            links = fan_out([functools.partial(fork, *each) for each in enumerate(session_id.split(","))])
            if len(steps := {link.applied_step for link in links}) > 1:
                raise StepMismatchError(
                    f"the shards would begin at different steps {sorted(steps)}; name a checkpoint of one step",
                    metadata={"steps": ",".join(map(str, sorted(steps)))},
                )
        except BaseException:
            if not request.request_id:
                for link in made:
                    link.close()
            raise
        return ShardedLink(links, Partition.read([link.description.packer.layout for link in links]))

    def sessions(self, timeout: float | None) -> Iterator[SessionInfo]:
        """Yield the servers' sessions one by one, shards of sharded ones included, server after server."""
        by_target = {server.targets: server for server in self._servers}
        return itertools.chain.from_iterable(server.sessions(timeout) for server in by_target.values())

    def statistics(self, interval: float, timeout: float | None) -> Closable[Statistics]:
        """See `ServerLink.statistics`; a snapshot has one of each server."""
        by_target = {server.targets: server for server in self._servers}
        return _Watches([server.statistics(interval, timeout) for server in by_target.values()])

    def close(self) -> None:
        """See `ServerLink.close`."""
        for server in self._servers:
            server.close()


class _Watches(Iterator[Statistics]):
    """Snapshots of several servers, put together."""

    def __init__(self, watches: Sequence[Closable[Statistics]]) -> None:
        self._watches = watches

    def __next__(self) -> Statistics:
        found = [next(watch) for watch in self._watches]
        servers = tuple(server for each in found for server in each.servers)
        return Statistics(servers, tuple(session for each in found for session in each.sessions))

    def close(self) -> None:
        """See `Closable`."""
        for watch in self._watches:
            watch.close()


def _check_worker(options: LinkOptions) -> None:
    """Refuse a choice of the worker that each server would make for itself.

    Raises:
        InvalidRequestError: it is one.
    """
    if options.worker is None:
        raise InvalidRequestError.of("worker", "each of several servers would choose for itself; name its index")


def _partition(config: session_pb2.SessionConfig, most: int) -> Partition:
    """Partition a model for at most `most` servers.

    Raises:
        InvalidRequestError: an option cannot be had from several servers.
        UnsupportedFeatureError: the rows of a table are named by ids.
    """
    if hashed := [tensor.name for tensor in config.tensors if tensor.table.hashed]:
        raise rows_by_ids(hashed[0])
    layout = place(specs_from_wire(config), len(config.groups))
    partition = Partition.make(layout, most, within_tensors=config.optimizer.rule not in _LAYERWISE)
    keeps = config.gradient.missing_gradient == optimizer_pb2.MISSING_GRADIENT_POLICY_KEEP
    if len(partition.shards) > 1 and keeps and any(group.HasField("schedule") for group in config.groups):
        raise InvalidRequestError.of(
            "schedule",
            "it counts the updates of a whole group, and with missing_gradient 'keep' a server sees only those of its "
            "shard; send the learning rate with each step",
        )
    return partition


def _configs(config: session_pb2.SessionConfig, partition: Partition) -> list[session_pb2.SessionConfig]:
    """Return the config of each shard's session: the whole's, with other tensors, and two phases if need be."""
    gradient = config.gradient
    decides = (
        gradient.HasField("clip_grad_norm")
        or any(group.HasField("clip_grad_norm") for group in config.groups)
        or gradient.non_finite != optimizer_pb2.NON_FINITE_POLICY_ALLOW
        or gradient.HasField("loss_scaling")
    )
    together = config.aggregation
    if decides and 0 < together.required_workers < together.workers and len(partition.shards) > 1:
        raise InvalidRequestError.of(
            "aggregation.required_workers",
            "clipping by norm, and policies for NaN, are decided for all shards at once, and with fewer than all "
            "workers shards may differ in theirs; leave it out, or use non_finite='allow' without clipping",
        )
    configs = []
    for rank in range(len(partition.shards)):
        own = session_pb2.SessionConfig()
        own.CopyFrom(config)
        del own.tensors[:]
        own.tensors.extend(map(spec_to_wire, partition.specs(rank)))
        own.gradient.two_phase = decides and len(partition.shards) > 1
        configs.append(own)
    return configs
