"""The thread of the log: group commit, failures, the fence, and the end."""

from __future__ import annotations

import concurrent.futures
import errno
import pathlib
import random
import threading

import pytest

from stepwire.errors import (
    DataLossError,
    DeadlineExceededError,
    FencedError,
    Reason,
    StepwireError,
    UnavailableError,
)
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import read_log
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.durability.writer import LogLimits, LogWriter
from tests.server.durability.logs import FOLDER, SEGMENT_BYTES, START, contents, records_of
from tests.server.durability.memory_disk import FailAt, MemoryDisk

SMALL = LogLimits(segment_bytes=SEGMENT_BYTES)


def record(entry: int, nbytes: int = 100, kind: Kind = Kind.COMMIT) -> Record:
    return Record(kind, bytes(16), entry, b"meta", bytes([entry % 256]) * nbytes)


def yes() -> bool:
    return True


class Held:
    """Holds one kind of call until told."""

    def __init__(self, name: str = "sync") -> None:
        self.name = name
        self.armed = False
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, name: str) -> None:
        if self.armed and name == self.name:
            self.entered.release()
            assert self.go.acquire(timeout=60)

    def await_call(self) -> None:
        assert self.entered.acquire(timeout=60)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def writer(held: Held) -> LogWriter:
    log = LogWriter(MemoryDisk(held), FOLDER, 1, yes, after=START)
    held.armed = True
    return log


def test_records_come_back_from_a_real_disk(tmp_path: pathlib.Path) -> None:
    log = LogWriter(Disk(), tmp_path, 1, yes, after=START, limits=LogLimits(segment_bytes=1 << 16))
    given = [record(entry, entry * 997) for entry in range(60)]
    numbers = [log.append(each, durable=entry % 4 == 0) for entry, each in enumerate(given)]
    log.wait(numbers[56])
    log.close()
    assert numbers == list(range(1, 61))
    assert [read.record for read in records_of(read_log(Disk(), tmp_path))] == given
    assert log.durable_position == log.position == LogPosition(1, 60)
    assert log.statistics().records == 60
    assert log.statistics().segments == len(list(tmp_path.iterdir()))


def test_all_that_wait_are_served_by_one_sync(writer: LogWriter, held: Held) -> None:
    first = writer.append(record(0), durable=True)
    held.await_call()
    numbers = [writer.append(record(entry), durable=True) for entry in range(1, 65)]
    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        waits = [threads.submit(writer.wait, number, 60.0) for number in numbers]
        assert (writer.statistics().syncs, writer.durable_position.number) == (0, 0)
        held.armed = False
        held.go.release()
        assert [wait.result() for wait in waits] == [None] * 64
    assert (first, writer.statistics().syncs) == (1, 2)
    writer.close()
    assert writer.statistics().syncs == 2


def test_chunks_alone_are_written_without_a_sync(held: Held) -> None:
    held.name = "write"
    disk = MemoryDisk(held)
    log = LogWriter(disk, FOLDER, 1, yes, after=START)
    syncs = disk.calls.count("sync")
    held.armed = True
    for entry in range(3):
        log.append(record(entry, kind=Kind.CHUNK))
        held.await_call()
        held.go.release()
    held.armed = False
    number = log.append(record(9))
    log.wait(log.append(record(10), durable=True))
    log.wait(number)
    assert disk.calls.count("sync") == syncs + 1
    log.close()


def test_closing_makes_durable_what_was_appended() -> None:
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 1, yes, after=START)
    for entry in range(5):
        log.append(record(entry, kind=Kind.CHUNK))
    log.close()
    log.close()
    assert log.durable_position == (1, 5)
    log.wait(5)
    assert [read.record.entry for read in contents(disk.after_power_loss(random.Random(0)))[0]] == list(range(5))
    with pytest.raises(UnavailableError) as refused:
        log.append(record(5))
    assert refused.value.reason is Reason.SHUTTING_DOWN
    assert disk.open_files == 0


def test_a_wait_has_its_limit(writer: LogWriter, held: Held) -> None:
    number = writer.append(record(1), durable=True)
    held.await_call()
    with pytest.raises(DeadlineExceededError):
        writer.wait(number, timeout=0.0)
    held.armed = False
    held.go.release()
    writer.wait(number, timeout=60.0)
    with pytest.raises(ValueError, match="record 2 was not appended"):
        writer.wait(2)
    writer.close()


def test_payloads_that_wait_have_their_limit() -> None:
    most: list[int] = []
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 1, yes, after=START, limits=LogLimits(SEGMENT_BYTES, 1000))
    disk.before = lambda name: most.append(log.statistics().pending_bytes)
    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        numbers = list(threads.map(lambda entry: log.append(record(entry, 400), durable=True), range(200)))
    log.wait(max(numbers))
    assert sorted(numbers) == list(range(1, 201))
    assert max(most) <= 1000
    log.wait(log.append(record(201, 5000), durable=True))  # a larger one than the limit goes alone
    log.close()
    assert log.statistics().pending_bytes == 0
    assert len(contents(disk)[0]) == 201


def test_an_appender_that_waits_for_room_is_told_of_a_failure(held: Held) -> None:
    disk = MemoryDisk(held)
    log = LogWriter(disk, FOLDER, 1, yes, after=START, limits=LogLimits(SEGMENT_BYTES, 1000))
    held.armed = True
    log.append(record(1), durable=True)
    held.await_call()
    log.append(record(2, 900))
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        blocked = threads.submit(log.append, record(3, 900))
        disk.before = FailAt(1, errno.EIO, only="write")
        held.go.release()
        with pytest.raises(DataLossError):  # told in place of a number, or by the wait for it
            log.wait(blocked.result())
    log.close()


def test_a_newer_owner_fences_and_nothing_is_confirmed() -> None:
    owner = True
    disk, failures = MemoryDisk(), list[StepwireError]()
    log = LogWriter(disk, FOLDER, 4, lambda: owner, after=START)
    log.on_failure(failures.append)
    first = log.append(record(1), durable=True)
    log.wait(first)
    owner = False
    second = log.append(record(2), durable=True)
    with pytest.raises(FencedError, match="since epoch 5") as fenced:
        log.wait(second)
    assert fenced.value.reason is Reason.NOT_PRIMARY
    log.wait(first)
    log.close()
    with pytest.raises(FencedError):
        log.append(record(3))
    log.on_failure(failures.append)
    assert [(type(failure), failure.reason) for failure in failures] == [(FencedError, Reason.NOT_PRIMARY)] * 2


class Short(MemoryDisk):
    """Writes less than it is given, and has only so much room."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.full = room, False

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.room <= 0:
            self.full = True
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(data.nbytes, 512, self.room)
        self.room -= count
        return super().write(descriptor, data[:count], offset)


def work(disk: MemoryDisk, *, awaited: bool = False) -> tuple[list[int], list[StepwireError]]:
    """Append and wait until it fails; returns the entries that were confirmed, and the errors that were told."""
    confirmed, told = list[int](), list[StepwireError]()
    try:
        log = LogWriter(disk, FOLDER, 1, yes, after=START, limits=SMALL)
    except StepwireError as error:
        return confirmed, [error]
    log.on_failure(told.append)
    try:
        for entry in range(0, 24, 2):
            log.append(record(entry, 2500, Kind.CHUNK))
            log.wait(log.append(record(entry + 1, 10), durable=True, awaited=awaited))
            confirmed += [entry, entry + 1]
    except StepwireError as error:
        assert (type(error), error.reason) == (DataLossError, Reason.DURABILITY_FAILED)
        for later in (lambda: log.append(record(99)), lambda: log.wait(len(confirmed) + 2), log.check):
            with pytest.raises(DataLossError, match=r"closed for good: \[Errno"):
                later()
    log.close()
    return confirmed, told


def check_confirmed(disk: MemoryDisk, confirmed: list[int]) -> None:
    """Read what a newer server would find, whether the machine failed too or not."""
    disk.before = lambda name: None
    for found in (disk, disk.after_power_loss(random.Random(len(confirmed)))):
        entries = [read.record.entry for read in contents(found)[0]]
        assert entries[: len(confirmed)] == confirmed
        assert entries == list(range(len(entries)))


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_call_is_told_and_loses_nothing_that_was_confirmed(error: int, awaited: bool) -> None:
    whole = MemoryDisk()
    assert work(whole, awaited=awaited) == (list(range(24)), [])
    for number in range(1, len(whole.calls)):
        failure = FailAt(number, error)
        disk = MemoryDisk(failure)
        confirmed, told = work(disk, awaited=awaited)
        assert disk.open_files == 0 or failure.failed == "close"
        assert len(told) == 1 or (failure.failed, confirmed) == ("close", list(range(24)))
        check_confirmed(disk, confirmed)


@pytest.mark.parametrize("name", ["write", "sync", "allocate", "sync_folder", "open"])
def test_every_kind_of_failure_occurs(name: str) -> None:
    failure = FailAt(3, errno.EIO, only=name)
    disk = MemoryDisk(failure)
    confirmed, told = work(disk)
    assert (failure.failed, len(told), len(confirmed) < 24) == (name, 1, True)
    check_confirmed(disk, confirmed)


@pytest.mark.parametrize("room", [0, 512, 4096, 10_000, 20_000, 33_333, 1 << 20])
def test_short_writes_are_continued_until_there_is_no_room(room: int) -> None:
    disk = Short(room)
    confirmed, told = work(disk)
    assert (disk.full, bool(told), len(confirmed) < 24) == (room < 1 << 20,) * 3
    check_confirmed(disk, confirmed)


def test_a_look_that_fails_closes_the_log() -> None:
    def look() -> bool:
        raise OSError(errno.EIO, "Input/output error")

    log = LogWriter(MemoryDisk(), FOLDER, 1, look, after=START)
    with pytest.raises(DataLossError) as failed:
        log.wait(log.append(record(1), durable=True))
    assert failed.value.reason is Reason.DURABILITY_FAILED
    log.close()


# --- the pen --------------------------------------------------------------------------------------------------


def test_a_caller_that_waits_for_its_record_writes_it(held: Held) -> None:
    writers = list[str]()
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 1, yes, after=START)
    disk.before = lambda name: writers.append(threading.current_thread().name)
    log.wait(log.append(record(1), durable=True, awaited=True))
    assert set(writers) == {threading.current_thread().name} and log.durable_position.number == 1
    log.close()


def test_records_that_arrive_while_a_caller_writes_are_written_after_it(held: Held) -> None:
    log = LogWriter(MemoryDisk(held), FOLDER, 1, yes, after=START)
    held.armed = True
    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        first = threads.submit(lambda: log.wait(log.append(record(0), durable=True, awaited=True)))
        held.await_call()
        numbers = [log.append(record(entry), durable=True, awaited=True) for entry in range(1, 61)]
        waits = [threads.submit(log.wait, number) for number in numbers]
        held.armed = False
        held.go.release()
        assert [wait.result(timeout=60) for wait in (first, *waits)] == [None] * 61
    assert log.statistics().syncs == 2
    log.close()


def test_a_record_whose_caller_does_not_wait_is_written_by_whoever_comes_next() -> None:
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 1, yes, after=START)
    log.append(record(1), durable=True, awaited=True)
    log.wait(log.append(record(2), durable=True, awaited=True), timeout=60.0)
    assert log.durable_position.number == 2
    log.append(record(3), durable=True, awaited=True)
    log.close()
    assert log.durable_position.number == 3
    assert [read.record.entry for read in contents(disk.after_power_loss(random.Random(0)))[0]] == [1, 2, 3]


def test_an_appender_without_room_is_not_left_to_a_caller_that_does_not_wait() -> None:
    log = LogWriter(MemoryDisk(), FOLDER, 1, yes, after=START, limits=LogLimits(SEGMENT_BYTES, 1000))
    log.append(record(1, 900), durable=True, awaited=True)
    log.append(record(2, 900), durable=True, awaited=True)
    log.close()
    assert log.durable_position.number == 2


def test_many_callers_and_the_thread_take_turns() -> None:
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 1, yes, after=START, limits=LogLimits(SEGMENT_BYTES, 5000))

    def caller(index: int) -> None:
        chance = random.Random(index)
        for entry in range(index * 1000, index * 1000 + 60):
            if chance.random() < 0.4:
                log.append(record(entry, chance.randrange(3000), Kind.CHUNK))
                continue
            number = log.append(record(entry, 40), durable=True, awaited=chance.random() < 0.8)
            log.wait(number, timeout=None if chance.random() < 0.9 else 60.0)
            assert log.durable_position.number >= number

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(caller, index) for index in range(12)]:
            done.result(timeout=60)
    log.close()
    assert log.statistics().pending_bytes == 0 and disk.open_files == 0
    entries = [read.record.entry for read in contents(disk)[0]]
    assert len(entries) == 12 * 60
    for index in range(12):
        assert [entry for entry in entries if entry // 1000 == index] == list(range(index * 1000, index * 1000 + 60))


def test_segments_are_released() -> None:
    disk = MemoryDisk()
    log = LogWriter(disk, FOLDER, 2, yes, after=START, limits=SMALL)
    for entry in range(20):
        log.append(record(entry, 3000))
    log.wait(log.append(record(20), durable=True))
    names = disk.names(FOLDER)
    assert log.release(LogPosition(2, 1)) == []
    assert log.release(LogPosition(2, 21)) == names[:-1]
    with pytest.raises(ValueError, match="behind the end"):
        log.release(LogPosition(2, 23))
    log.close()
    assert contents(disk)[1] == (2, 21)
