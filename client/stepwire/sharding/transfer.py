"""A state on its way from the shards of one partition to those of another one, in bounded memory.

Each former shard is read by a thread of its own, and each new one is written by one. Between them there is room for a
few blocks a shard.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from stepwire.connection.retry import Deadline
from stepwire.errors import StateChangedError, StepwireError, UnavailableError
from stepwire.links.remote import RemoteLink
from stepwire.links.server import RemoteServer
from stepwire.sharding.coordinator import Abandoned
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.moved_numbers import moved_numbers
from stepwire.sharding.partition import Partition
from stepwire.sharding.redistribution import MovedBlock, Redistribution
from stepwire.v1 import move_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.frames import read_frame, whole_message

__all__ = ["Transfer"]

_ROOM: Final = 8
_MOST_CHUNK_BYTES: Final = 1 << 20
_PATIENCE_SECONDS: Final = 30.0
"""The time that a frozen session may need until it can be read."""


class _Pipe:
    """The messages of one new shard, made by several threads and sent by another one. Closing ends all waits."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._complete = self._closed = False

    def put(self, message: bytes) -> None:
        """Wait for room, and add a message.

        Raises:
            Abandoned: the pipe was closed: another call of the transfer has failed.
        """
        with self._changed:
            while len(self._messages) >= _ROOM and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Abandoned
            self._messages.append(message)
            self._changed.notify_all()

    def complete(self, message: bytes) -> None:
        """Add the last message."""
        with self._changed:
            self._messages.append(message)
            self._complete = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the messages until the last one; less, if the pipe is closed."""
        while True:
            with self._changed:
                while not (self._messages or self._closed or self._complete):
                    self._changed.wait()
                if not self._messages or self._closed:
                    return
                message = self._messages.popleft()
                self._changed.notify_all()
            yield message


class Transfer:
    """The copy of one state. Used once."""

    def __init__(
        self,
        former: Partition,
        sources: Sequence[tuple[RemoteServer, RemoteLink]],
        new: Partition,
        targets: Sequence[tuple[RemoteServer, RemoteLink]],
    ) -> None:
        """Copy from the sessions of one partition to those of another one.

        Args:
            former: the partition that the model has.
            sources: the servers and sessions of its shards.
            new: the partition that the model gets.
            targets: the servers and sessions of its shards.
        """
        self._former, self._new = former, new
        self._sources, self._targets = sources, targets
        layouts, spaces = ([link.description.packer.layout for _, link in each] for each in (sources, targets))
        self._ways = Redistribution(former, layouts, new, spaces)
        self._slots = [frozenset(link.description.slots) for _, link in targets]
        self._pipes = [_Pipe() for _ in targets]
        self._numbers: list[move_pb2.StateNumbers | None] = [None] * len(sources)
        self._keys: list[bytes | None] = [None] * len(targets)
        self._over = threading.Event()
        self._lock = threading.Lock()

    def make(self, move_id: str, renew: Callable[[threading.Event], object], deadline: Deadline) -> list[bytes]:
        """Copy everything, and return the keys of the targets' attach tokens.

        Args:
            move_id: the move that has frozen the sources.
            renew: keeps them frozen until an event is set.
            deadline: the deadline of everything.

        Raises:
            StepwireError: the refusal of a server, or a broken connection; the sources are as before.
        """
        with deadline.part() as left:
            imports = [functools.partial(self._import, rank, left) for rank in range(len(self._targets))]
            exports = [functools.partial(self._export, rank, move_id, left) for rank in range(len(self._sources))]
            calls: list[Callable[[], object]] = [*exports, *imports, functools.partial(renew, self._over)]
            fan_out([functools.partial(_guarded, call, left) for call in calls], lambda: self._give_up(left))
        return [key for key in self._keys if key is not None]

    def _give_up(self, left: Deadline) -> None:
        left.end()
        self._over.set()
        for pipe in self._pipes:
            pipe.close()

    def _import(self, rank: int, deadline: Deadline) -> None:
        server, link = self._targets[rank]
        opening = move_pb2.ImportOpen(session_id=link.description.session_id, attach_token=link.hold.token)

        def messages() -> Iterator[bytes]:
            yield pb.ImportSessionRequest(open=opening).SerializeToString()
            yield from self._pipes[rank]

        response = server.calls.upload("ImportSession", messages(), pb.ImportSessionResponse, deadline)
        with self._lock:
            self._keys[rank] = response.attach_key
            if None not in self._keys:
                self._over.set()

    def _export(self, rank: int, move_id: str, deadline: Deadline) -> None:
        server, link = self._sources[rank]
        request = pb.ExportSessionRequest(
            session_id=link.description.session_id,
            move_id=move_id,
            chunk_bytes=min(
                _MOST_CHUNK_BYTES, *(each.description.chunk_bytes for _, each in (*self._sources, *self._targets))
            ),
        )
        begun = threading.Event()

        def attempt(_: Deadline) -> None:
            try:
                server.calls.download("ExportSession", request, functools.partial(self._read, rank, begun), deadline)
            except StateChangedError as error:
                if begun.is_set():
                    raise UnavailableError(f"an export broke off: {error}; move the session again") from None
                raise  # a checkpoint is being read, or a server that was restarted comes to rest once more

        retry = server.calls.retry
        patience = retry.deadline(min(_PATIENCE_SECONDS, deadline.remaining()))
        with deadline.within(patience.end):
            retry.call(attempt, patience)

    def _read(self, rank: int, begun: threading.Event, messages: Iterator[bytes]) -> None:
        for data in messages:
            begun.set()
            frame = read_frame(pb.ExportSessionResponse, data)
            message: pb.ExportSessionResponse = frame.message
            if message.HasField("numbers"):
                self._numbered(rank, message.numbers)
                return
            values = frame.payload.view(FLOAT32)
            for block in self._ways.split(rank, message.slot, message.chunk.offset, values):
                self._send(block)
        raise UnavailableError("the server ended an export early; move the session again")

    def _send(self, block: MovedBlock) -> None:
        if block.slot in self._slots[block.shard] or block.slot.startswith("row_numbers."):
            message = pb.ImportSessionRequest(
                slot=block.slot, chunk=tensor_pb2.Chunk(offset=block.start, count=len(block.values))
            )
            self._pipes[block.shard].put(whole_message(message, block.values))

    def _numbered(self, rank: int, numbers: move_pb2.StateNumbers) -> None:
        """Note that a source is read; the last one completes the targets."""
        with self._lock:
            self._numbers[rank] = numbers
            known = [each for each in self._numbers if each is not None]
        if len(known) == len(self._sources):
            for pipe, own in zip(self._pipes, moved_numbers(self._former, known, self._new), strict=True):
                pipe.complete(pb.ImportSessionRequest(numbers=own).SerializeToString())


def _guarded(call: Callable[[], object], left: Deadline) -> None:
    """Make a call; one that fails after another has failed fails because of that one.

    Raises:
        StepwireError: the failure of the call.
        Abandoned: the deadline of all was ended before.
    """
    try:
        call()
    except StepwireError:
        if left.ended:
            raise Abandoned from None
        raise
