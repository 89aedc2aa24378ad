"""The sessions of a cluster that gets another number of shards: moved by their ids, before surplus shards end."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.wire.directory import SCHEME, ShardDirectory

__all__ = ["Scaling"]


class Scaling:
    """Moves sessions between the shards of a directory."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Use the directory in a folder."""
        self._folder, self._directory = folder, ShardDirectory(folder)

    def scale(
        self, sessions: Sequence[str], former: Sequence[str], new: Sequence[str], surplus: Sequence[str]
    ) -> Iterator[str]:
        """Move sessions onto shards, and yield the new id of each.

        Args:
            sessions: the ids, as `Session.session_id` has them.
            former: the names of the shards that they may be on.
            new: the names of the shards that they are to be on, in order.
            surplus: the names of the shards that are to end.

        Raises:
            InvalidRequestError: another session is on a shard that is to end.
            StepwireError: as `stepwire.move_session`; the sessions before have moved.
        """
        for session_id in sessions:
            known = [self._target(name) for name in dict.fromkeys((*former, *new))]
            yield stepwire.move_session(session_id, known, [self._target(name) for name in new])
        for name in surplus:
            self._check_empty(name)

    def end(self, names: Iterable[str]) -> None:
        """Say in the directory that shards have ended, so that new clients do not wait for them."""
        for name in names:
            self._directory.end(name, self._directory.newest(name)[0])

    def _check_empty(self, name: str) -> None:
        with stepwire.connect(self._target(name)) as client:
            left = sum(1 for _ in client.sessions())
        if left:
            raise InvalidRequestError.of(
                "session",
                f"{left} more sessions are on {name}, which is to end; name them with --session, by "
                "Session.session_id, or close them. All shards go on",
            )

    def _target(self, name: str) -> str:
        return f"{SCHEME}{self._folder}/{name}"
