"""The fence: in every interleaving of two owners, the newer one and the one after it read all that was acknowledged."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator

from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.durability.segments import SegmentWriter
from tests.server.durability.logs import FOLDER, START, Read, contents
from tests.server.durability.memory_disk import MemoryDisk

EPOCHS = pathlib.Path("/data/epochs")
# A record is larger than what remains of a segment, so that each second one has a segment of its own.
SEGMENT_BYTES = 8192


class Story:
    """Two owners of one data directory, and what they told their clients."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.epochs = Epochs(self.disk, EPOCHS)
        self.told: dict[int, list[Read]] = {1: [], 2: []}
        self.read: list[Read] = []

    def serve(self, epoch: int, after: LogPosition, steps: int) -> Iterator[None]:
        """Append, sync, look, and tell, one at a time, until the look fails."""
        writer = SegmentWriter(self.disk, FOLDER, epoch, after=after, segment_bytes=SEGMENT_BYTES)
        yield
        for entry in range(steps):
            record = Record(Kind.COMMIT, bytes(16), entry, b"epoch %d" % epoch, bytes(3000))
            number = writer.append(record, last=True)
            writer.flush()
            yield
            writer.sync()
            yield
            if not self.epochs.is_owner(epoch):
                return
            yield
            self.told[epoch].append(Read(LogPosition(epoch, number), record))
            yield

    def old(self) -> Iterator[None]:
        yield from self.serve(self.epochs.acquire(), START, 2)

    def new(self) -> Iterator[None]:
        epoch = self.epochs.acquire()
        yield
        self.read, end = contents(self.disk)
        yield
        yield from self.serve(epoch, end, 1)


def test_whatever_was_told_is_read_by_both_later_owners() -> None:
    stories = fenced = 0
    for places in itertools.combinations(range(14), 6):
        story = Story()
        old, new = story.old(), story.new()
        next(old)
        for turn in range(14):
            next(new if turn in places else old, None)
        assert story.read[: len(story.told[1])] == story.told[1]
        third, _ = contents(story.disk)
        assert third[: len(story.read)] == story.read or not story.told[2]
        if story.told[2]:
            assert third == story.read + story.told[2]
        assert third[: len(story.told[1])] == story.told[1]
        stories += 1
        fenced += len(story.told[1]) < 2
    assert (stories, fenced > 500) == (3003, True)


def test_the_other_orders_lose() -> None:
    """The model tells a right order from a wrong one: a look before the sync, and a read before the epoch."""
    story = Story()
    epoch = story.epochs.acquire()
    writer = SegmentWriter(story.disk, FOLDER, epoch, after=START, segment_bytes=SEGMENT_BYTES)
    assert story.epochs.is_owner(epoch)
    story.epochs.acquire()
    read, _ = contents(story.disk)
    number = writer.append(Record(Kind.COMMIT, bytes(16), 1), last=True)
    writer.sync()
    assert (read, number) == ([], 1)
