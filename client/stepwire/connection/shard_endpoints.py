"""The endpoints of shards by their names, as a folder has them or as servers have told them of late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from stepwire.errors import Reason, StepwireError, UnavailableError
from stepwire.wire.directory import ShardDirectory

__all__ = ["EndpointSource", "FolderEndpoints", "LearntEndpoints", "ShardEndpoints"]

_FRESH_SECONDS: Final = 0.5


class ShardEndpoints(Protocol):
    """The shards of a target, and the endpoint of each. Thread-safe."""

    def shards(self, seconds: float) -> list[str]:
        """Return the names of the shards, sorted; none for a target that is one plain server.

        Raises:
            StepwireError: nobody tells within these seconds, or the servers are no shards.
        """

    def endpoint(self, shard: str, seconds: float) -> str:
        """Return the endpoint of a shard, `host:port`.

        Raises:
            UnavailableError: nobody tells within these seconds, or no server has the shard just now.
        """


class EndpointSource(Protocol):
    """Somebody who can be asked for all endpoints at once."""

    def endpoints(self, seconds: float) -> Mapping[str, str]:
        """Return the endpoint of each shard by its name, empty for one that no server has just now.

        Raises:
            StepwireError: as `ShardEndpoints.shards`.
        """


class FolderEndpoints:
    """The shards of a directory, read anew each time; see `ShardEndpoints`."""

    def __init__(self, directory: ShardDirectory) -> None:
        """Read a directory."""
        self._directory = directory

    def shards(self, seconds: float) -> list[str]:
        """See `ShardEndpoints`."""
        return self._directory.shards()

    def endpoint(self, shard: str, seconds: float) -> str:
        """See `ShardEndpoints`."""
        return self._directory.newest(shard)[1]


class LearntEndpoints:
    """The shards that a source tells of; see `ShardEndpoints`.

    The calls of all shards fail together where a network does. One of them asks, and the others have what it learnt.
    """

    def __init__(self, source: EndpointSource, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet; `clock` returns seconds."""
        self._source, self._clock, self._lock = source, clock, threading.Lock()
        self._learnt: Mapping[str, str] | StepwireError = {}
        self._fresh_until = clock()

    def shards(self, seconds: float) -> list[str]:
        """See `ShardEndpoints`."""
        learnt = self._fresh(seconds)
        for shard, endpoint in learnt.items():
            if not endpoint:
                raise _not_served(shard)
        return sorted(learnt)

    def endpoint(self, shard: str, seconds: float) -> str:
        """See `ShardEndpoints`."""
        try:
            found = self._fresh(seconds).get(shard)
        except StepwireError as problem:  # whatever it is of others: this shard is looked for again
            raise UnavailableError(str(problem), reason=Reason.UNREACHABLE) from None
        if not found:
            raise _not_served(shard)
        return found

    def _fresh(self, seconds: float) -> Mapping[str, str]:
        """Return what was learnt a moment ago, or ask.

        Raises:
            StepwireError: as the source, a moment ago or now.
        """
        with self._lock:
            if self._clock() >= self._fresh_until:
                try:
                    self._learnt = self._source.endpoints(seconds)
                except StepwireError as problem:
                    self._learnt = problem
                self._fresh_until = self._clock() + _FRESH_SECONDS
            learnt = self._learnt
        if isinstance(learnt, StepwireError):
            raise learnt
        return learnt


def _not_served(shard: str) -> UnavailableError:
    return UnavailableError(
        f"no server has the shard {shard!r} just now; start one, or promote its standby", reason=Reason.UNREACHABLE
    )
