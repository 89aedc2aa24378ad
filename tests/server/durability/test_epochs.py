"""Epochs: in sequence, the newest owns, and the oldest go."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from stepwire_server.durability.disk import Disk
from stepwire_server.durability.epochs import KEPT, Epochs
from tests.server.durability.memory_disk import MemoryDisk

FOLDER = pathlib.Path("/data/epochs")


class Racing(MemoryDisk):
    """Another owner acquires an epoch right before this one opens its own."""

    def __init__(self, rivals: int) -> None:
        super().__init__()
        self.rivals = rivals

    def open(self, path: pathlib.Path, flags: int) -> int:
        if self.rivals:
            self.rivals -= 1
            super().close(super().open(path, flags))
        return super().open(path, flags)


def test_epochs_are_files_in_sequence_that_say_who_made_them(tmp_path: pathlib.Path) -> None:
    epochs = Epochs(Disk(), tmp_path)
    assert (epochs.newest(), epochs.acquire("one"), epochs.acquire("two"), epochs.newest()) == (0, 1, 2, 2)
    about = json.loads((tmp_path / "0000000000000002").read_text())
    assert (about["epoch"], about["pid"], about["instance"]) == (2, os.getpid(), "two")


def test_the_newest_epoch_owns() -> None:
    epochs = Epochs(MemoryDisk(), FOLDER)
    first = epochs.acquire()
    assert epochs.is_owner(first)
    second = epochs.acquire()
    assert (epochs.is_owner(first), epochs.is_owner(second)) == (False, True)


@pytest.mark.parametrize("rivals", [1, 3])
def test_of_two_that_want_one_number_one_gets_it(rivals: int) -> None:
    disk = Racing(rivals)
    epochs = Epochs(disk, FOLDER)
    assert epochs.acquire() == rivals + 1
    assert disk.names(FOLDER) == [f"{number:016x}" for number in range(1, rivals + 2)]


def test_an_owner_that_was_paused_until_its_successors_are_forgotten_knows() -> None:
    disk = MemoryDisk()
    epochs = Epochs(disk, FOLDER)
    owned = [epochs.acquire() for _ in range(3 * KEPT)]
    assert owned == list(range(1, 3 * KEPT + 1))
    assert disk.names(FOLDER) == [f"{number:016x}" for number in owned[-KEPT:]]
    assert [epoch for epoch in owned if epochs.is_owner(epoch)] == owned[-1:]


class Sleeping(MemoryDisk):
    """While one owner has read the names and not yet opened its file, many others come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping = False

    def open(self, path: pathlib.Path, flags: int) -> int:
        if self.sleeping:
            self.sleeping = False
            for _ in range(2 * KEPT):
                Epochs(self, FOLDER).acquire()
        return super().open(path, flags)


def test_a_number_that_was_forgotten_is_not_acquired_again() -> None:
    disk = Sleeping()
    epochs = Epochs(disk, FOLDER)
    first = epochs.acquire()
    disk.sleeping = True
    assert epochs.acquire() == first + 2 * KEPT + 1
    assert (epochs.is_owner(first), epochs.is_owner(first + 1)) == (False, False)


def test_an_epoch_is_on_the_disk_before_it_is_told() -> None:
    disk = MemoryDisk()
    Epochs(disk, FOLDER).acquire()
    (file,) = disk.folders[FOLDER].values()
    assert file.synced == bytes(file.content) != b""
