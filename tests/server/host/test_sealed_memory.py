"""Shared memory: sized for good, there to the last page, and nothing that a client does to it reaches the server."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.host.memory_map import LARGE_PAGE_BYTES
from stepwire_server.host.sealed_memory import SharedMemory, in_pages
from tests.support.raw_handoff import held_by_process

BYTES, FLOATS = np.dtype(np.uint8), np.dtype(np.float32)
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
FUTURE_WRITE = 0x10
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def punch(descriptor: int, start: int, count: int) -> int:
    """Punch a hole; returns the error's number, or 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.fallocate(descriptor, PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(count))
    return ctypes.get_errno() if failed else 0


def allocated_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


@pytest.mark.parametrize(
    ("asked", "pages"), [(0, 1), (1, 1), (mmap.PAGESIZE, 1), (mmap.PAGESIZE + 1, 2), (7 * mmap.PAGESIZE - 1, 7)]
)
def test_memory_is_whole_pages_of_zeros_all_there(asked: int, pages: int) -> None:
    with SharedMemory("stepwire-test", asked) as memory:
        assert memory.nbytes == pages * mmap.PAGESIZE == in_pages(asked)
        assert os.fstat(memory.descriptor).st_size == memory.nbytes == allocated_bytes(memory.descriptor)
        assert not memory.array(BYTES, memory.nbytes).any()


def test_memory_beyond_large_pages_is_all_there_too() -> None:
    with SharedMemory("stepwire-test", 2 * LARGE_PAGE_BYTES + 1) as memory:
        assert allocated_bytes(memory.descriptor) == memory.nbytes == 2 * LARGE_PAGE_BYTES + mmap.PAGESIZE
        values = memory.array(BYTES, memory.nbytes)
        assert (values.ctypes.data % LARGE_PAGE_BYTES, values.any()) == (0, False)


def test_the_seals_are_these() -> None:
    with SharedMemory("stepwire-test", 1) as written, SharedMemory("stepwire-test", 1, read_only=True) as shown:
        seals = [fcntl.fcntl(memory.descriptor, fcntl.F_GET_SEALS) for memory in (written, shown)]
    assert seals == [SIZE_SEALS, SIZE_SEALS | FUTURE_WRITE]


@pytest.mark.parametrize("read_only", [False, True])
def test_nobody_changes_the_size(read_only: bool) -> None:
    with SharedMemory("stepwire-test", 3 * mmap.PAGESIZE, read_only=read_only) as memory:
        client = os.dup(memory.descriptor)
        for size in (0, mmap.PAGESIZE, memory.nbytes + 1, 1 << 40):
            with pytest.raises(PermissionError):
                os.ftruncate(client, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(client, fcntl.F_ADD_SEALS, 0x1)
        os.close(client)
        assert memory.array(BYTES, memory.nbytes)[-1] == 0


def test_a_hole_reads_as_zeros_and_can_be_written() -> None:
    """A punched page comes back at the next touch: no signal reaches the server."""
    with SharedMemory("stepwire-test", 4 * mmap.PAGESIZE) as memory:
        values = memory.array(BYTES, memory.nbytes)
        values[:] = 7
        assert punch(memory.descriptor, mmap.PAGESIZE, 2 * mmap.PAGESIZE) == 0
        assert allocated_bytes(memory.descriptor) == 2 * mmap.PAGESIZE
        expected = np.repeat(np.array([7, 0, 0, 7], np.uint8), mmap.PAGESIZE)
        np.testing.assert_array_equal(values, expected)
        values[:] = 9
        assert values.sum() == 9 * memory.nbytes


def test_memory_to_be_read_is_written_by_the_server_alone() -> None:
    with SharedMemory("stepwire-test", 2 * mmap.PAGESIZE, read_only=True) as memory:
        client = os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDWR)  # as a process of the same user could
        for attempt in (
            lambda: mmap.mmap(client, memory.nbytes),
            lambda: os.pwrite(client, b"x", 0),
        ):
            with pytest.raises(PermissionError):
                attempt()
        assert punch(client, 0, mmap.PAGESIZE) == errno.EPERM
        shown = mmap.mmap(client, memory.nbytes, prot=mmap.PROT_READ)
        os.close(client)
        memory.array(FLOATS, 2)[:] = (1.5, -2.0)
        assert np.frombuffer(shown, np.float32, 2).tolist() == [1.5, -2.0]


def test_where_the_kernel_lacks_the_seal_a_descriptor_to_read_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fcntl.fcntl

    def old_kernel(descriptor: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_ADD_SEALS and argument == FUTURE_WRITE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, command, argument)

    before = held_by_process()
    monkeypatch.setattr("stepwire_server.host.sealed_memory.fcntl.fcntl", old_kernel)
    with SharedMemory("stepwire-test", 1, read_only=True) as memory:
        monkeypatch.undo()
        assert fcntl.fcntl(memory.descriptor, fcntl.F_GET_SEALS) == SIZE_SEALS
        with pytest.raises(PermissionError):
            mmap.mmap(memory.descriptor, memory.nbytes)
        memory.array(BYTES, 1)[0] = 5
        assert mmap.mmap(memory.descriptor, memory.nbytes, prot=mmap.PROT_READ)[0] == 5
        assert held_by_process()[0] == before[0] + 1
    assert held_by_process() == before


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("os.memfd_create", errno.EMFILE),
        ("os.ftruncate", errno.EFBIG),
        ("os.posix_fallocate", errno.ENOSPC),
        ("os.posix_fallocate", errno.ENOMEM),
        ("mmap.mmap", errno.ENOMEM),
        ("fcntl.fcntl", errno.EPERM),
    ],
)
def test_what_the_system_refuses_leaves_nothing(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = held_by_process()
    monkeypatch.setattr(f"stepwire_server.host.sealed_memory.{call}", refuse)
    with pytest.raises(OSError) as refused:
        SharedMemory("stepwire-test", mmap.PAGESIZE, read_only=True)
    monkeypatch.undo()
    assert refused.value.errno == number
    del refused
    assert held_by_process() == before


def test_arrays_outlive_the_memory_that_they_are_of() -> None:
    before = held_by_process()
    memory = SharedMemory("stepwire-gradient", mmap.PAGESIZE)
    values = memory.array(FLOATS, 3)
    assert held_by_process() == (before[0] + 1, before[1] + 1)
    memory.close()
    memory.close()
    values[:] = 3.0
    assert values.sum() == 9.0
    assert held_by_process() == (before[0], before[1] + 1)
    del values
    assert held_by_process() == before


def test_a_duplicate_is_closed_by_itself() -> None:
    before = held_by_process()
    with SharedMemory("stepwire-parameters", 1) as memory:
        twin = memory.duplicate()
        assert (twin.nbytes, twin.descriptor != memory.descriptor) == (memory.nbytes, True)
        twin.array(BYTES, 1)[0] = 3
        assert memory.array(BYTES, 1)[0] == 3
        twin.close()
        assert os.fstat(memory.descriptor).st_size == memory.nbytes
    assert held_by_process() == before


@pytest.mark.parametrize("use", [lambda memory: memory.descriptor, lambda memory: memory.array(BYTES, 1)])
def test_closed_memory_is_not_used(use: Callable[[SharedMemory], object]) -> None:
    memory = SharedMemory("stepwire-test", 1)
    memory.close()
    with pytest.raises(AssertionError), contextlib.closing(memory):
        use(memory)
