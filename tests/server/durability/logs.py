"""Logs that tests write, and the records in them."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from stepwire_server.durability.reading import LogRecord, read_log
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.durability.segments import SegmentWriter
from tests.server.durability.memory_disk import MemoryDisk

FOLDER = pathlib.Path("/data/log")
START = LogPosition(0, 0)
SEGMENT_BYTES = 16384


class Read(NamedTuple):
    """A record as a reader sees it."""

    position: LogPosition
    record: Record


def random_record(chance: random.Random) -> Record:
    """Return a record of random size, often a small one."""
    payload = chance.randbytes(chance.choice((0, 0, 1, 300, 512, 3000, 5000, 20000)))
    kind, meta = chance.choice(list(Kind)), chance.randbytes(chance.randrange(40))
    return Record(kind, chance.randbytes(16), chance.randrange(2**60), meta, payload)


def random_batches(chance: random.Random, most: int) -> list[list[Record]]:
    """Return batches of random records, each to be synced."""
    return [
        [random_record(chance) for _ in range(chance.randint(1, 5))]
        for _ in range(chance.randint(0 if most < 3 else 1, most))
    ]


def records_of(reader: Iterable[LogRecord]) -> Iterator[Read]:
    """Yield the records of a log with their payloads."""
    for found in reader:
        header = found.header
        record = Record(header.kind, header.session, header.entry, found.meta, found.read_payload().tobytes())
        yield Read(found.position, record)


def contents(disk: MemoryDisk) -> tuple[list[Read], LogPosition]:
    """Return the records of a log, and its end."""
    reader = read_log(disk, FOLDER)
    return list(records_of(reader)), reader.end


def write_epoch(
    disk: MemoryDisk, epoch: int, after: LogPosition, batches: list[list[Record]], *, acknowledged: list[Read]
) -> SegmentWriter:
    """Write batches of records, each with a sync; `acknowledged` gets those whose sync has returned."""
    writer = SegmentWriter(disk, FOLDER, epoch, after=after, segment_bytes=SEGMENT_BYTES)
    for batch in batches:
        numbers = [writer.append(record, last=index == len(batch) - 1) for index, record in enumerate(batch)]
        writer.sync()
        acknowledged += [
            Read(LogPosition(epoch, number), record) for number, record in zip(numbers, batch, strict=True)
        ]
    return writer
