"""The loss of power at every system call: what was acknowledged is read, and no crash looks like damage."""

from __future__ import annotations

import random

import pytest

from stepwire_server.durability.records import LogPosition, Record
from tests.server.durability.logs import START, Read, contents, random_batches, write_epoch
from tests.server.durability.memory_disk import MemoryDisk, PowerLoss


class LosePowerAt:
    """Ends everything at one call, counted from 1."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise PowerLoss(name)


def everything(epoch: int, batches: list[list[Record]]) -> list[Read]:
    """Return the records of batches as a reader would see them."""
    records = [record for batch in batches for record in batch]
    return [Read(LogPosition(epoch, number), record) for number, record in enumerate(records, 1)]


def run(disk: MemoryDisk, epoch: int, after: LogPosition, batches: list[list[Record]], losing: int) -> list[Read]:
    """Write batches until the power fails, and return what was acknowledged."""
    acknowledged: list[Read] = []
    disk.before = LosePowerAt(losing)
    try:
        write_epoch(disk, epoch, after, batches, acknowledged=acknowledged)
    except PowerLoss:
        pass
    disk.before = lambda name: None
    return acknowledged


@pytest.mark.parametrize("seed", range(4))
def test_after_a_loss_of_power_at_any_call_what_was_acknowledged_is_read(seed: int) -> None:
    chance = random.Random(seed)
    batches, later = random_batches(chance, 6), random_batches(chance, 3)
    whole = MemoryDisk()
    write_epoch(whole, 1, START, batches, acknowledged=[])
    for losing in range(1, len(whole.calls) + 2):
        disk = MemoryDisk()
        acknowledged = run(disk, 1, START, batches, losing)
        found_disk = disk.after_power_loss(chance)
        found, end = contents(found_disk)
        assert found == everything(1, batches)[: len(found)]
        assert found[: len(acknowledged)] == acknowledged

        acknowledged = run(found_disk, 2, end, later, chance.randint(1, 40))
        again, _ = contents(found_disk.after_power_loss(chance))
        assert again[: len(found)] == found
        assert again[len(found) :] == everything(2, later)[: len(again) - len(found)]
        assert again[len(found) : len(found) + len(acknowledged)] == acknowledged
