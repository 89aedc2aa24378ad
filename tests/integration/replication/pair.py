"""A primary and its standby, and what can happen between the two."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

import stepwire
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.records import ReplicationRecord
from stepwire_server.replication.upkeep import Upkeep
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_server

ELEMENTS: Final = 20_000  # a gradient is a chunk of its own and a commit
START: Final = {"w": np.linspace(-1.0, 1.0, ELEMENTS, dtype=np.float32)}
SHARD: Final = "a"
_PATIENCE_SECONDS: Final = 120.0


def gradient(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).standard_normal(ELEMENTS).astype(np.float32)}


def undisturbed(steps: int, **options: Any) -> list[bytes]:
    """Return the replies of steps that nothing disturbs."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), **options)
        return [session.step(gradient(step))["w"].tobytes() for step in range(steps)]


class Pair:
    """Two servers that see one directory.

    Attributes:
        folder: the directory.
        primary: the server that serves first.
        standby: the server that follows.
    """

    primary: Server
    standby: Server

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack

    @property
    def target(self) -> str:
        return f"directory:{self.folder}"

    @property
    def speaker(self) -> Primary:
        """The primary's side of replication."""
        return self.primary.replication.following()[0]

    @property
    def upkeep(self) -> Upkeep:
        return self.primary.replication.following()[1]

    def serve(self, **settings: Any) -> Server:
        """Start a server that sees the directory."""
        where = {"directory": str(self.folder), "shard": SHARD, "drain_seconds": 5.0}
        return self._stack.enter_context(numpy_server(**where | settings))

    def follow(self, **settings: Any) -> Server:
        """Start a standby of the primary, and wait until it has all."""
        standby = self.serve(standby_of=self.primary.target, **settings)
        self.await_member(standby)
        return standby

    def await_member(self, standby: Server) -> None:
        """Wait until a standby has all of the primary."""
        speaker = self.speaker
        with speaker.outbox.changed:
            assert speaker.outbox.changed.wait_for(
                lambda: (
                    speaker.is_member
                    and speaker.standby_id == standby.replication.server_id
                    and all(each.synced is not None for each in speaker.replicas.values())
                ),
                _PATIENCE_SECONDS,
            )

    def create(self, client: stepwire.Client, **options: Any) -> stepwire.Session:
        return client.create_session(START, optimizer=stepwire.Adam(lr=0.1), durability="replicated", **options)

    def cut(self) -> None:
        """Cut the standby off: it follows no more, and has nothing to say; the primary notices."""
        call, speaker = self.standby.replication._call, self.speaker
        assert call is not None
        call._tell = lambda epoch: None  # type: ignore[method-assign]
        call._ended.set()
        call._call.cancel()
        with speaker.outbox.changed:
            assert speaker.outbox.changed.wait_for(lambda: not speaker.outbox.connected, _PATIENCE_SECONDS)

    def kill(self, server: Server) -> None:
        """End a server as a kill does: nothing more leaves it, and it hands nothing over."""
        server._grpc.stop(None)

    def intercept(self, at: int, happens: Callable[[], object], *, admitted: bool) -> threading.Event:
        """Have something happen at one of the next records, instead of its acknowledgement.

        Args:
            at: the number of the record, from now on, from 0.
            happens: called in a thread of its own; the standby's receiver waits for it.
            admitted: the standby has the record; otherwise the record is lost too.
        """
        follower, seen, done = self.standby.replication._follower, [0], threading.Event()
        assert follower is not None
        admit = follower.admit

        def intercepted(record: ReplicationRecord) -> None:
            seen[0] += 1
            if seen[0] != at + 1:
                admit(record)
                return
            if admitted:
                admit(record)
            follower.admit = admit  # type: ignore[method-assign]
            thread = threading.Thread(target=happens, daemon=True)
            thread.start()
            thread.join(_PATIENCE_SECONDS)
            done.set()
            raise stepwire.UnavailableError("the connection is cut here")

        follower.admit = intercepted  # type: ignore[method-assign]
        return done


@contextlib.contextmanager
def pair_in(folder: pathlib.Path) -> Iterator[Pair]:
    """Run a pair for a block; its primary takes no steps without the standby."""
    with contextlib.ExitStack() as stack:
        pair = Pair(folder, stack)
        pair.primary = pair.serve(standby="required")
        pair.standby = pair.follow()
        yield pair
