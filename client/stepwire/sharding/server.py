"""The link to several servers, each of which holds a shard of every session."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from stepwire.connection.errands import undelivered
from stepwire.connection.retry import Deadline
from stepwire.connection.watch import Closable
from stepwire.errors import InvalidRequestError, SessionMovedError, StepMismatchError
from stepwire.links.remote import RemoteLink
from stepwire.links.server import LinkOptions, RemoteServer, ServerLink
from stepwire.results import ServerInfo, SessionInfo
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.following import FollowedLink, FollowingLink
from stepwire.sharding.link import ShardedLink
from stepwire.sharding.partition import Partition
from stepwire.sharding.shard_configs import configs_of, partition_of
from stepwire.sharding.successors import FoundShard, ShardPlace, Successors
from stepwire.statistics import Statistics
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2

__all__ = ["ShardedServer", "check_worker", "followed_link", "linked"]

_END_SECONDS: Final = 5.0


class ShardedServer(ServerLink):
    """Links to several servers, or several links to one: sessions are partitioned over them, and stepped in parallel.

    A model that is too small to be cut for all targets lies on the first ones.

    Attributes:
        successors: finds sessions, those too that have moved.
    """

    def __init__(self, servers: Sequence[RemoteServer], opened: Callable[[str], RemoteServer]) -> None:
        """Use the links of one server each, which are closed with this one.

        Args:
            servers: the servers.
            opened: makes the link to another server, which a session has moved to, by its target.
        """
        self._servers = tuple(servers)
        self.successors = Successors(self._servers, opened)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of all servers, in order."""
        return tuple(target for server in self._servers for target in server.targets)

    def info(self, timeout: float | None) -> ServerInfo:
        """Ask the servers for their properties.

        Returns:
            The features that all serve, the protocols that all speak, the least of the limits, the largest epoch.
            Devices are those of all, as `"host:port cuda:0"`; versions, instances and shards are joined by commas.

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
            shard=",".join(dict.fromkeys(info.shard for info in infos if info.shard)),
            epoch=max(info.epoch for info in infos),
        )

    def create(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> FollowingLink:
        """See `ServerLink.create`; each shard's request has an id of its own, made from `request_id`."""
        check_worker(options)
        partition = partition_of(config, len(self._servers))
        configs = configs_of(config, partition)
        made: list[RemoteLink] = []

        def create(rank: int) -> RemoteLink:
            own_id = None if request_id is None else f"{request_id}.{rank}"
            link, is_new = self._servers[rank].created(configs[rank], own_id, timeout, options)
            if request_id is None:  # nobody else knows the session, so nobody would end it
                undelivered(link.close)
            if is_new and not link.description.is_aggregated:  # workers may have found it meanwhile
                made.append(link)
            return link

        try:
            links = fan_out([functools.partial(create, rank) for rank in range(len(configs))])
        except SessionMovedError as moved:  # the session of an earlier request of this id; a shard of it tells where
            for link in made:  # in vain, unless somebody has found it meanwhile
                link.leave(_END_SECONDS)
            return self.find(moved.metadata["session_id"], timeout, options)
        return self._following(ShardedLink(links, partition), options)

    def find(self, session_id: str, timeout: float | None, options: LinkOptions) -> FollowingLink:
        """Return the link to a sharded session, where it is now.

        Args:
            session_id: the ids of all shards in order, joined by commas. The servers of the session must be among
                these, or one of those that it has moved from.
            timeout: seconds.
            options: as for `create`; error feedback starts with nothing kept.

        Raises:
            InvalidRequestError: these are not the shards of one model.
            SessionNotFoundError: a shard does not exist.
            UnavailableError: a server cannot be reached.
        """
        check_worker(options)
        ids = session_id.split(",") if session_id else []
        if not ids:
            raise InvalidRequestError.of("session_id", "there is no id; give the ids of all shards, in their order")

        deadline = self._servers[0].calls.deadline(timeout)
        found = self.successors.find(self.successors.places(ids), options, deadline)
        return self._following(linked(found), options)

    def fork(
        self, session_id: str, request: pb.ForkSessionRequest, timeout: float | None, *, error_feedback: bool
    ) -> FollowingLink:
        """Fork every shard; see `ServerLink.fork`. Forks of some shards alone end, unless the request has an id.

        Raises:
            StepMismatchError: the shards are at different steps.
            StepwireError: the refusal of a server.
        """
        made, places = list[RemoteLink](), self.successors.places(session_id.split(","))

        def fork(rank: int, place: ShardPlace) -> RemoteLink:
            own = pb.ForkSessionRequest()
            own.CopyFrom(request)
            own.request_id = request.request_id and f"{request.request_id}.{rank}"
            link = self.successors.at_holder(
                place, lambda server: server.fork(place.session_id, own, timeout, error_feedback=error_feedback)
            )[1]
            made.append(link)
            return link

        try:
            links = fan_out([functools.partial(fork, *each) for each in enumerate(places)])
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
        partition = Partition.read([link.description.packer.layout for link in links])
        return self._following(ShardedLink(links, partition), LinkOptions(error_feedback))

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
        self.successors.close()
        for server in self._servers:
            server.close()

    def _following(self, link: ShardedLink, options: LinkOptions) -> FollowingLink:
        return FollowingLink(link, functools.partial(followed_link, self.successors, options))


def followed_link(
    successors: Successors, options: LinkOptions, former: FollowedLink, deadline: Deadline
) -> FollowedLink:
    """Return the link to a session that has moved, which goes on where the former one stopped, as the same worker.

    Raises:
        InvalidRequestError: the worker was to be chosen by the server, and there are several by now.
        StepwireError: as `Successors.find`.
    """
    places = successors.followed(successors.places_of(former.shards), deadline)
    options = options._replace(worker=former.worker)
    found = successors.find(places, options, deadline)
    if isinstance(former, RemoteLink) and len(found) == 1:
        found[0].link.succeed(former)
        return found[0].link
    check_worker(options)
    link = linked(found)
    link.succeed(former)
    return link


def linked(found: Sequence[FoundShard]) -> ShardedLink:
    """Return the link to the shards of one model.

    Raises:
        InvalidRequestError: as `ShardedLink`.
    """
    links = [shard.link for shard in found]
    return ShardedLink(links, Partition.read([link.description.packer.layout for link in links]))


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


def check_worker(options: LinkOptions) -> None:
    """Refuse a choice of the worker that each server would make for itself.

    Raises:
        InvalidRequestError: it is one.
    """
    if options.worker is None:
        raise InvalidRequestError.of("worker", "each of several servers would choose for itself; name its index")
