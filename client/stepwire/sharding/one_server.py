"""The link to one server, whose sessions are followed wherever they move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from stepwire.connection.watch import Closable
from stepwire.errors import SessionMovedError
from stepwire.links.remote import RemoteLink
from stepwire.links.server import LinkOptions, RemoteServer, ServerLink
from stepwire.results import ServerInfo, SessionInfo
from stepwire.sharding.following import FollowedLink, FollowingLink
from stepwire.sharding.server import ShardedServer, check_worker, followed_link, linked
from stepwire.statistics import Statistics
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2

__all__ = ["OneServer"]


class OneServer(ServerLink):
    """The link to one server. A session that moves is followed: to another server, or to several.

    Attributes:
        server: the link to the server that the user named.
    """

    def __init__(self, server: RemoteServer, opened: Callable[[str], RemoteServer]) -> None:
        """Use the link of a server, which is closed with this one.

        Args:
            server: the link.
            opened: makes the link to another server, which a session has moved to, by its target.
        """
        self.server = server
        self._several = ShardedServer([server], opened)  # for sessions that have moved to several, or come from there
        self._successors = self._several.successors

    @property
    def targets(self) -> tuple[str, ...]:
        """See `ServerLink.targets`."""
        return self.server.targets

    def info(self, timeout: float | None) -> ServerInfo:
        """See `ServerLink.info`."""
        return self.server.info(timeout)

    def create(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> FollowingLink:
        """See `ServerLink.create`; the session of an earlier request is found where it is now."""
        try:
            link = self.server.create(config, request_id, timeout, options)
        except SessionMovedError as moved:
            return self.find(moved.metadata["session_id"], timeout, options)
        return self._following(link, options)

    def find(self, session_id: str, timeout: float | None, options: LinkOptions) -> FollowingLink:
        """See `ServerLink.find`: a session is found where it is now, by an id that it had on this server."""
        if "," in session_id:
            return self._several.find(session_id, timeout, options)
        deadline = self.server.calls.deadline(timeout)
        found = self._successors.find(self._successors.places([session_id]), options, deadline)
        if len(found) == 1:
            return self._following(found[0].link, options)
        check_worker(options)
        return self._following(linked(found), options)

    def fork(
        self, session_id: str, request: pb.ForkSessionRequest, timeout: float | None, *, error_feedback: bool
    ) -> FollowingLink:
        """See `ServerLink.fork`; a session that has moved is forked where it is."""
        if "," in session_id:
            return self._several.fork(session_id, request, timeout, error_feedback=error_feedback)
        (place,) = self._successors.places([session_id])

        def fork(server: RemoteServer) -> RemoteLink:
            return server.fork(session_id, request, timeout, error_feedback=error_feedback)

        return self._following(self._successors.at_holder(place, fork)[1], LinkOptions(error_feedback))

    def sessions(self, timeout: float | None) -> Iterator[SessionInfo]:
        """See `ServerLink.sessions`."""
        return self.server.sessions(timeout)

    def statistics(self, interval: float, timeout: float | None) -> Closable[Statistics]:
        """See `ServerLink.statistics`."""
        return self.server.statistics(interval, timeout)

    def close(self) -> None:
        """See `ServerLink.close`."""
        self._several.close()

    def _following(self, link: FollowedLink, options: LinkOptions) -> FollowingLink:
        return FollowingLink(link, functools.partial(followed_link, self._successors, options))
