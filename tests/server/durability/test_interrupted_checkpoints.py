"""A disk that fails at any call, once or for good: what was there stays whole, and nothing half-written counts."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.errors import DataLossError, InvalidRequestError
from stepwire_server.durability.checkpoints import CheckpointStore, automatic_name
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import encode_manifest
from tests.server.durability.checkpoint_cases import (
    FailingDisk,
    ShortDisk,
    bits,
    make_manifest,
    make_values,
    open_files,
    read_checkpoint,
    write_checkpoint,
)

SLOTS = {"param": 2000, "exp_avg": 1999}
OLD, NEW = make_values(SLOTS, 1), make_values(SLOTS, 2)
NEVER = 1 << 30

Ways = pytest.mark.parametrize(
    "way",
    [
        {"number": errno.EIO},
        {"number": errno.ENOSPC},
        {"number": errno.EROFS, "lasting": True},
        {"number": errno.EIO, "lasting": True},
        {"number": errno.EIO, "afterwards": True},
        {"number": errno.EIO, "afterwards": True, "lasting": True},
    ],
    ids=["EIO", "ENOSPC", "read-only from then on", "crash", "EIO after it is done", "crash after it is done"],
)


def calls_of(action: Callable[[Disk], Any]) -> list[str]:
    """Count the calls of an action that succeeds."""
    disk = FailingDisk(NEVER)
    action(disk)
    return disk.calls


def fail_everywhere(
    tmp_path: pathlib.Path, action: Callable[[CheckpointStore], Any], way: dict[str, Any], check: Callable[..., None]
) -> list[str]:
    """Let an action fail at each call in turn, each time in a fresh copy of `tmp_path/checkpoints`.

    Args:
        tmp_path: has the checkpoints to begin with.
        action: the calls of a store.
        way: the way to fail, as `FailingDisk` has it.
        check: called with a store of a sound disk and the failing one, after each failure.

    Returns:
        The calls of the action when nothing fails.
    """
    at = 0
    while True:
        folder = tmp_path / f"copy-{at}"
        shutil.copytree(tmp_path / "checkpoints", folder)
        disk, before = FailingDisk(at, **way), open_files()
        try:
            action(CheckpointStore(disk, folder))
        except (OSError, DataLossError, InvalidRequestError):
            pass
        else:
            if len(disk.calls) <= at:
                return disk.calls
        assert open_files() == before
        check(CheckpointStore(Disk(), folder), disk)
        shutil.rmtree(folder)
        at += 1


def newest_name(store: CheckpointStore) -> str:
    checkpoint, damaged = store.newest()
    assert checkpoint is not None
    with checkpoint:
        checkpoint.body.verify()
    return checkpoint.name


@pytest.mark.many
@Ways
def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: pathlib.Path, way: dict[str, Any]) -> None:
    old = write_checkpoint(CheckpointStore(Disk(), tmp_path / "checkpoints"), "old", OLD, make_manifest(1))
    new = make_manifest(2)
    committed: list[bool] = []

    def action(store: CheckpointStore) -> None:
        committed[:] = []
        write_checkpoint(store, "new", NEW, new)
        committed.append(True)

    def check(store: CheckpointStore, disk: FailingDisk) -> None:
        # A disk that dies between the rename and the sync behind it leaves either newest, and both are whole.
        renamed = way.get("lasting") and "rename" in disk.calls
        name = newest_name(store)
        assert name == "new" if committed else name in (["old", "new"] if renamed else ["old"])
        assert all(info.damage is None for info in store.list())
        for found, manifest, values in (("old", old, OLD), ("new", new, NEW)):
            if found in [info.name for info in store.list()]:
                read, arrays = read_checkpoint(store, found)
                assert (read.step, bits(arrays)) == (manifest.step, bits(values))
        store.prune(0)
        assert {path.name for path in store.folder.iterdir()} <= {"old", "new"}
        if name == "old":
            write_checkpoint(store, "new", NEW, new)
        assert bits(read_checkpoint(store, "new")[1]) == bits(NEW)

    calls = fail_everywhere(tmp_path, action, way, check)
    assert {"write", "sync", "sync_folder", "rename", "allocate", "make_folder"} <= set(calls)


def test_all_is_synced_before_it_has_its_name(tmp_path: pathlib.Path) -> None:
    calls = calls_of(lambda disk: write_checkpoint(CheckpointStore(disk, tmp_path / "c"), "new", NEW, make_manifest()))
    kept = [call for call in calls if call in ("make_folder", "write", "sync", "sync_folder", "rename")]
    body = kept.index("sync")
    assert set(kept[3:body]) == {"write"}
    assert kept[:3] == ["make_folder", "sync_folder", "make_folder"]
    assert kept[body:] == ["sync", "write", "sync", "sync_folder", "rename", "sync_folder"]


@Ways
def test_a_failed_read_is_no_damage_and_hands_out_nothing(tmp_path: pathlib.Path, way: dict[str, Any]) -> None:
    """An error of the disk is raised as it is: it must not let an older checkpoint pass for the newest."""
    store = CheckpointStore(Disk(), tmp_path / "checkpoints")
    write_checkpoint(store, "old", OLD, make_manifest(1))
    write_checkpoint(store, "new", NEW, make_manifest(2))
    found: list[str] = []

    def action(store: CheckpointStore) -> None:
        found[:] = []
        checkpoint, _ = store.newest()
        assert checkpoint is not None
        with checkpoint:
            checkpoint.body.verify()
            out = np.empty(2000, np.float32)
            checkpoint.body.read("param", 0, out)
            found.append(checkpoint.name)
            assert out.tobytes() == NEW["param"].tobytes()

    def check(store: CheckpointStore, disk: FailingDisk) -> None:
        assert found == [] or (found == ["new"] and disk.calls[-1] == "close")
        assert newest_name(store) == "new"

    assert {"open", "read", "size", "names", "close"} <= set(fail_everywhere(tmp_path, action, way, check))


def test_an_error_of_the_disk_names_the_file(tmp_path: pathlib.Path) -> None:
    """So that the operator can delete the one checkpoint that cannot be read: that reads nothing of it."""

    class BadSector(Disk):
        bad = -1

        def open(self, path: pathlib.Path, flags: int) -> int:
            descriptor = super().open(path, flags)
            if path.parts[-2:] == self.parts:
                self.bad = descriptor
            return descriptor

        def close(self, descriptor: int) -> None:
            self.bad = -1 if descriptor == self.bad else self.bad
            super().close(descriptor)

        def read(self, descriptor: int, out: memoryview, offset: int) -> int:
            if descriptor == self.bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(descriptor, out, offset)

        def __init__(self, *parts: str) -> None:
            self.parts = parts

    write_checkpoint(CheckpointStore(Disk(), tmp_path), "old", OLD, make_manifest(1))
    write_checkpoint(CheckpointStore(Disk(), tmp_path), "new", NEW, make_manifest(2))
    for file in ("manifest.json", "state.safetensors"):
        store = CheckpointStore(BadSector("old", file), tmp_path)
        for call in (
            store.newest,
            store.list,
            lambda store=store: store.open("old"),
            lambda store=store: store.prune(1),
        ):
            with pytest.raises(OSError, match="Input/output error") as refused:
                call()
            assert (refused.value.errno, refused.value.filename) == (errno.EIO, str(tmp_path / "old" / file))
    store.delete("old")
    assert newest_name(store) == "new"


def test_an_error_within_an_array_names_the_file(tmp_path: pathlib.Path) -> None:
    write_checkpoint(CheckpointStore(Disk(), tmp_path), "new", NEW, make_manifest(2))
    disk = FailingDisk(NEVER)
    with CheckpointStore(disk, tmp_path).open("new") as checkpoint:
        vars(disk)["_at"] = len(disk.calls)
        with pytest.raises(OSError, match="Input/output error") as refused:
            checkpoint.body.read("param", 0, np.empty(2000, np.float32))
    assert refused.value.filename == str(tmp_path / "new" / "state.safetensors")


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_and_reads_change_nothing(tmp_path: pathlib.Path, most: int) -> None:
    store = CheckpointStore(ShortDisk(most), tmp_path / "checkpoints")
    written = write_checkpoint(store, "new", NEW, make_manifest())
    manifest, values = read_checkpoint(store, "new")
    assert (encode_manifest(manifest), bits(values)) == (encode_manifest(written), bits(NEW))


@pytest.mark.many
@Ways
@pytest.mark.parametrize("name", ["old", "new"])
def test_an_interrupted_deletion_leaves_a_valid_store(tmp_path: pathlib.Path, way: dict[str, Any], name: str) -> None:
    store = CheckpointStore(Disk(), tmp_path / "checkpoints")
    write_checkpoint(store, "old", OLD, make_manifest(1))
    write_checkpoint(store, "new", NEW, make_manifest(2))
    other = {"old": "new", "new": "old"}[name]

    def check(store: CheckpointStore, disk: FailingDisk) -> None:
        infos = {info.name: info.damage for info in store.list()}
        assert infos[other] is None
        if name in infos and infos[name] is not None:
            assert f"{name}/manifest.json: file: this is no file: No such file" in str(infos[name])
        whole = name in infos and infos[name] is None
        assert newest_name(store) == ("new" if whole or other == "new" else "old")
        if name in infos:
            store.delete(name)
        assert [path.name for path in store.folder.iterdir()] == [other]
        store.verify(other)

    calls = fail_everywhere(tmp_path, lambda store: store.delete(name), way, check)
    assert [call for call in calls if call not in ("open", "close")] == [
        "exists",
        "names",
        "names",
        "remove",
        "sync_folder",
        "remove",
        "remove_folder",
        "sync_folder",
    ]


@pytest.mark.many
@Ways
def test_an_interrupted_pruning_leaves_a_valid_store(tmp_path: pathlib.Path, way: dict[str, Any]) -> None:
    store = CheckpointStore(Disk(), tmp_path / "checkpoints")
    for step in range(1, 5):
        write_checkpoint(store, automatic_name(step, 0), make_values(SLOTS, step), make_manifest(step, 0))
    write_checkpoint(store, "best", OLD, make_manifest(2))
    (store.folder / automatic_name(1, 0) / "manifest.json").unlink()
    leftover = store.begin("left", SLOTS)
    kept = {automatic_name(3, 0), automatic_name(4, 0), "best"}

    def check(store: CheckpointStore, disk: FailingDisk) -> None:
        good = {info.name for info in store.list() if info.damage is None}
        assert good in (kept, kept | {automatic_name(2, 0)})
        assert newest_name(store) == automatic_name(4, 0)
        store.prune(2)
        assert {path.name for path in store.folder.iterdir()} == kept
        for name in kept:
            store.verify(name)

    fail_everywhere(tmp_path, lambda store: store.prune(2), way, check)
    leftover.abort()


@pytest.mark.many
@Ways
def test_an_interrupted_link_leaves_both_stores_valid(tmp_path: pathlib.Path, way: dict[str, Any]) -> None:
    source = CheckpointStore(Disk(), tmp_path / "source")
    write_checkpoint(source, "start", NEW, make_manifest(2))
    write_checkpoint(CheckpointStore(Disk(), tmp_path / "checkpoints"), "old", OLD, make_manifest(1))

    def action(store: CheckpointStore) -> None:
        CheckpointStore(store_disk(store), source.folder).link("start", store, "new")

    def check(store: CheckpointStore, disk: FailingDisk) -> None:
        assert bits(read_checkpoint(source, "start")[1]) == bits(NEW)
        assert all(info.damage is None for info in store.list())
        assert newest_name(store) in (["old", "new"] if "rename" in disk.calls else ["old"])
        store.prune(0)
        if [info.name for info in store.list()] == ["old"]:
            source.link("start", store, "new")
        assert bits(read_checkpoint(store, "new")[1]) == bits(NEW)

    assert "link" in fail_everywhere(tmp_path, action, way, check)


def store_disk(store: CheckpointStore) -> Disk:
    """Return the disk that a store was made with."""
    disk = vars(store)["_disk"]
    assert isinstance(disk, Disk)
    return disk


def test_stores_on_two_file_systems_are_not_linked(tmp_path: pathlib.Path) -> None:
    class TwoDisks(Disk):
        def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    store = CheckpointStore(TwoDisks(), tmp_path / "one")
    write_checkpoint(store, "start", NEW, make_manifest())
    other = CheckpointStore(TwoDisks(), tmp_path / "two")
    with pytest.raises(OSError, match="cross-device"):
        store.link("start", other, "new")
    assert (other.list(), list(other.folder.iterdir())) == ((), [])
