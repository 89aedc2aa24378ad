"""A link that follows a session to other servers: whoever uses it sees one slow call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import PulledRows
from stepwire.connection.retry import Deadline
from stepwire.errors import SessionMovedError
from stepwire.links.direct import DirectSteps
from stepwire.links.link import Load, SessionLink
from stepwire.links.remote import RemoteLink
from stepwire.results import SessionInfo, SessionStatistics, TransportChoice
from stepwire.sharding.link import ShardedLink
from stepwire.steps.call import StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import state_pb2, step_pb2

__all__ = ["Follow", "FollowedLink", "FollowingLink"]

_T = TypeVar("_T")

FollowedLink: TypeAlias = RemoteLink | ShardedLink
"""The link to a session where it is: on one server, or on several."""

Follow: TypeAlias = Callable[[FollowedLink, Deadline], FollowedLink]
"""Returns the link to the place that a session has now, which goes on where another link stopped."""


class FollowingLink(SessionLink):
    """The link to a session, and another one in its place once a server says that the session has moved.

    A call that was refused so is made again at the new place. A step is repeated there by its number, as after any
    failure: its outcome is known from the numbers of the new shards.
    """

    def __init__(self, link: FollowedLink, follow: Follow) -> None:
        """Use a link, and follow it."""
        self._link = link
        self._follow = follow

    @property
    def description(self) -> SessionDescription:
        """See `SessionLink.description`: the ids are those of the present shards."""
        return self._link.description

    @property
    def lock(self) -> threading.RLock:
        """See `SessionLink.lock`: the lock stays the same."""
        return self._link.lock

    @property
    def direct(self) -> DirectSteps | None:
        """See `SessionLink.direct`: a step that finds the session moved is made by `step` then."""
        return self._link.direct

    @property
    def carry(self) -> Carry:
        """See `SessionLink.carry`."""
        return self._link.carry

    @property
    def shards(self) -> tuple[RemoteLink, ...]:
        """The links of the present shards, in order."""
        return self._link.shards

    @property
    def applied_step(self) -> int:
        """See `SessionLink.applied_step`."""
        return self._link.applied_step

    @property
    def last_result(self) -> step_pb2.StepResult | None:
        """See `SessionLink.last_result`."""
        return self._link.last_result

    @property
    def transport(self) -> TransportChoice | None:
        """See `SessionLink.transport`."""
        return self._link.transport

    def deadline(self, timeout: float | None) -> Deadline:
        """See `SessionLink.deadline`."""
        return self._link.deadline(timeout)

    def attach(self, deadline: Deadline, *, transport: str | None = None, take_over: bool = False) -> None:
        """See `SessionLink.attach`."""
        self._followed(lambda link, left: link.attach(left, transport=transport, take_over=take_over), deadline)

    def detach(self) -> None:
        """See `SessionLink.detach`."""
        self._link.detach()

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """See `SessionLink.step`."""
        return self._followed(lambda link, left: link.step(call, left), deadline)

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull`."""
        return self._followed(lambda link, left: link.pull(targets, dtype, left), deadline)

    def pull_rows(self, rows: PulledRows, dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull_rows`."""
        return self._followed(lambda link, left: link.pull_rows(rows, dtype, left), deadline)

    def load(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.load`."""
        if _load_in_doubt(self._link):  # of an earlier call
            self.attach(deadline)
        former = self._link

        def make(link: FollowedLink, left: Deadline) -> None:
            if link is former or not _has_loaded(link, left):
                link.load(load, left)

        self._followed(make, deadline)

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.initialize`."""
        self._followed(lambda link, left: link.initialize(load, left), deadline)

    def shared(self, deadline: Deadline) -> SharedArrays:
        """See `SessionLink.shared`."""
        return self._followed(lambda link, left: link.shared(left), deadline)

    def forget_writes(self) -> None:
        """See `SessionLink.forget_writes`."""
        self._link.forget_writes()

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> list[Any]:
        """See `SessionLink.ask`."""
        return self._followed(lambda link, left: link.ask(method, request, response, left), deadline)

    def make_sure(self, deadline: Deadline) -> None:
        """See `SessionLink.make_sure`."""
        self._followed(lambda link, left: link.make_sure(left), deadline)

    def info(self, deadline: Deadline) -> SessionInfo:
        """See `SessionLink.info`."""
        return self._followed(lambda link, left: link.info(left), deadline)

    def statistics(self) -> SessionStatistics:
        """See `SessionLink.statistics`."""
        return self._link.statistics()

    def close(self) -> None:
        """See `SessionLink.close`: the session ends where it is now."""
        self._followed(lambda link, left: link.close(), self.deadline(None))

    def leave(self, seconds: float | None) -> None:
        """See `SessionLink.leave`; a session that moved unseen has its lease."""
        self._link.leave(seconds)

    def _followed(self, call: Callable[[FollowedLink, Deadline], _T], deadline: Deadline) -> _T:
        """Make a call where the session is, and again where it has moved meanwhile.

        Raises:
            StepwireError: as the call, and as `Follow`.
        """
        while True:
            link = self._link
            try:
                if isinstance(link, RemoteLink):
                    return call(link, deadline)
                with deadline.part() as left:  # the failure of one shard ends the time of the others
                    return call(link, left)
            except SessionMovedError:
                pass
            with self.lock:
                if self._link is link:
                    self._link = self._follow(link, deadline)


def _load_in_doubt(link: FollowedLink) -> int:
    """Return the number of a load that failed and may have been committed; 0 for none."""
    return max(shard.hold.load_in_doubt for shard in link.shards)


def _has_loaded(link: FollowedLink, deadline: Deadline) -> bool:
    """Tell whether a load that was under way at the former place of a session had been committed there."""
    if not (doubt := _load_in_doubt(link)):
        return False
    link.attach(deadline)
    return all(shard.hold.applied_load == doubt for shard in link.shards)
