"""The servers of sharded sessions, found by their ids: where the user named them, and where they have moved since."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from stepwire.connection.retry import Deadline
from stepwire.errors import (
    FencedError,
    Reason,
    SessionMovedError,
    SessionNotFoundError,
    StepwireError,
    UnavailableError,
)
from stepwire.links.remote import RemoteLink
from stepwire.links.server import LinkOptions, RemoteServer
from stepwire.sharding.fan_out import fan_out
from stepwire.v1 import move_pb2

__all__ = ["FoundShard", "ShardPlace", "Successors"]

_ASK_SECONDS: Final = 5.0


class ShardPlace(NamedTuple):
    """A shard's session as far as it is known.

    Attributes:
        session_id: its id.
        servers: the servers that may have it, the likeliest first.
        token: the proof of the hold of a worker; 0 for none.
        worker: the index of that worker.
    """

    session_id: str
    servers: Sequence[RemoteServer]
    token: int = 0
    worker: int = 0


class FoundShard(NamedTuple):
    """A shard's session with the server that has it."""

    server: RemoteServer
    link: RemoteLink


class Successors:
    """Finds sessions, and follows those that have moved."""

    def __init__(self, servers: Sequence[RemoteServer], opened: Callable[[str], RemoteServer]) -> None:
        """Find sessions on some servers; `opened` makes the link to another one, by its target."""
        self._servers = tuple(servers)
        self._opened = opened
        self._others: dict[str, RemoteServer] = {}

    @property
    def targets(self) -> str:
        """The targets of the servers that the user named."""
        return ", ".join(target for server in self._servers for target in server.targets)

    def places(self, ids: Sequence[str]) -> list[ShardPlace]:
        """Return the places of ids: an id is one shard's, wherever its server stands among the targets."""
        found = []
        for rank, session_id in enumerate(ids):
            likeliest = self._servers[rank : rank + 1]
            others = [each for each in (*self._servers, *self._others.values()) if each not in likeliest]
            found.append(ShardPlace(session_id, (*likeliest, *others)))
        return found

    def places_of(self, links: Iterable[RemoteLink]) -> list[ShardPlace]:
        """Return the places of sessions that have links, with the proofs of their holds."""
        known = (*self._servers, *self._others.values())
        return [
            ShardPlace(
                link.description.session_id,
                [each for each in known if link.target in each.targets],
                link.hold.token,
                link.worker or 0,
            )
            for link in links
        ]

    def find(self, places: Sequence[ShardPlace], options: LinkOptions, deadline: Deadline) -> list[FoundShard]:
        """Find the shards of a session, where they are now.

        Raises:
            SessionNotFoundError: no server has one of them.
            StepwireError: as `Client.session`.
        """
        while True:
            try:
                return fan_out([functools.partial(self._find, place, options, deadline) for place in places])
            except SessionMovedError:
                places = self.followed(places, deadline)

    def followed(self, places: Sequence[ShardPlace], deadline: Deadline) -> list[ShardPlace]:
        """Return the places of the successor of a session that has moved.

        Raises:
            StepwireError: no server tells.
        """
        shards = self._servers[0].calls.retry.call(functools.partial(self._asked, places), deadline)
        free = list(self._servers)
        found = []
        for shard in shards:
            named = next((each for each in free if shard.target in each.targets), None)
            if named is not None:
                free.remove(named)  # with several connections to one target, each shard has one
            server = named or self._other(shard.target)
            found.append(ShardPlace(shard.session_id, [server], shard.attach_token, places[0].worker))
        return found

    def close(self) -> None:
        """Close the links to servers that the user did not name."""
        for server in self._others.values():
            server.close()

    def _find(self, place: ShardPlace, options: LinkOptions, deadline: Deadline) -> FoundShard:
        def call(server: RemoteServer) -> RemoteLink:
            return server.find(place.session_id, deadline.remaining() or None, options, token=place.token)

        return FoundShard(*self.at_holder(place, call))

    def at_holder(
        self, place: ShardPlace, call: Callable[[RemoteServer], RemoteLink]
    ) -> tuple[RemoteServer, RemoteLink]:
        """Call the server that has a shard, and return it with the result.

        Raises:
            SessionNotFoundError: no server has it.
            StepwireError: as the call.
        """
        for server in place.servers:
            try:
                return server, call(server)
            except SessionNotFoundError:
                if len(place.servers) == 1:
                    raise
        raise SessionNotFoundError(
            f"session {place.session_id!r} is on none of the servers {self.targets}; it has ended, or its server is "
            "not among these targets"
        )

    def _asked(self, places: Sequence[ShardPlace], deadline: Deadline) -> list[move_pb2.SuccessorShard]:
        """Ask the shards in order, each server once. The first one's record decides, and the others follow it."""
        problems: list[StepwireError] = []
        for place in places:
            for server in place.servers:
                try:
                    left = server.calls.retry.deadline(min(_ASK_SECONDS, deadline.remaining()))
                    if shards := _successor(server, place, left):
                        return shards
                except (UnavailableError, SessionNotFoundError) as error:  # perhaps its server has ended since
                    problems.append(error)
        raise UnavailableError(f"no server tells where the session is now: {[str(each) for each in problems]}")

    def _other(self, target: str) -> RemoteServer:
        if target not in self._others:
            self._others[target] = self._opened(target)
        return self._others[target]


def _successor(server: RemoteServer, place: ShardPlace, deadline: Deadline) -> list[move_pb2.SuccessorShard]:
    """Ask a server for the successor of a session; see `RemoteServer.successor`.

    A client that had lost the worker gets no tokens. It keeps its own, by which the new shards tell it the same.
    """
    try:
        return server.successor(place.session_id, place.token, deadline, place.worker)
    except FencedError as error:
        if error.reason != Reason.FENCED:
            raise
    shards = server.successor(place.session_id, 0, deadline)
    for shard in shards:
        shard.attach_token = place.token
    return shards
