"""The checkpoints of one session: a folder each, complete from the moment it has its name.

A checkpoint is written into a folder `.new-NAME-RANDOM`, and renamed when its files have reached the disk. It is
deleted manifest first. So a folder without a manifest is never a checkpoint, and one with a manifest was complete.

Symbolic links are refused, of files and folders alike: nothing here puts any.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

import msgspec
import structlog

from stepwire.errors import DataLossError, InvalidRequestError
from stepwire_server.durability.checkpoint import BODY, MANIFEST, Checkpoint, CheckpointInfo, CheckpointWriter
from stepwire_server.durability.disk import Disk, write_new
from stepwire_server.durability.folders import NEW_PREFIX, NewFolder, is_folder, name_taken, remove_files
from stepwire_server.durability.manifest import Manifest, damaged, write_manifest

__all__ = [
    "AUTOMATIC_PREFIX",
    "CheckpointStore",
    "NewestCheckpoint",
    "automatic_name",
    "moment_of",
]

AUTOMATIC_PREFIX: Final = "auto-"

_AUTOMATIC: Final = re.compile(r"auto-(\d+)-(\d+)")
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

_log = structlog.get_logger()


class NewestCheckpoint(NamedTuple):
    """The result of a search for the newest checkpoint.

    Attributes:
        checkpoint: the newest good one, open, for the caller to close; None if there is none.
        damaged: the damaged ones that were passed over.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[CheckpointInfo, ...]


class CheckpointStore:
    """The folder of one session's checkpoints. One store of a folder serves a process; its calls may overlap.

    Attributes:
        folder: the folder, which the first checkpoint makes.
    """

    def __init__(self, disk: Disk, folder: pathlib.Path, work: pathlib.Path | None = None) -> None:
        """Serve a folder; nothing is read or made.

        Args:
            disk: the file system.
            folder: the folder.
            work: the folder for checkpoints that are not complete; None for `folder`.
        """
        self._disk = disk
        self._work = work
        self.folder = folder
        self._writing: set[str] = set()

    def begin(self, name: str, slots: Mapping[str, int]) -> CheckpointWriter:
        """Begin a checkpoint.

        Args:
            name: its name.
            slots: the number of elements of each slot.

        Raises:
            InvalidRequestError: the name is none, or another checkpoint has it.
            OSError: the disk failed; nothing stays.
        """
        return CheckpointWriter(self._disk, self._new_folder(name), name, slots)

    def link(self, name: str, other: CheckpointStore, new_name: str, manifest: Manifest | None = None) -> Manifest:
        """Give another store the same checkpoint, without a copy of its arrays: the body's file gets a second name.

        Both must lie on one file system. There is no copying across two.

        Args:
            name: the checkpoint's name here.
            other: the other store.
            new_name: the checkpoint's name there.
            manifest: its numbers there; None for the same. Name and arrays are filled in.

        Returns:
            The manifest as it was written.

        Raises:
            InvalidRequestError: the checkpoint is not there, or the new name is none or is in use.
            DataLossError: the checkpoint is damaged.
            OSError: the disk failed, or the stores lie on two file systems (EXDEV). Nothing stays.
        """
        with self.open(name) as source:
            whole = msgspec.structs.replace(manifest or source.manifest, name=new_name, arrays=source.manifest.arrays)
        folder = other._new_folder(new_name)
        try:
            folder.make()
            self._disk.link(self.folder / name / BODY, folder.path / BODY)
            write_manifest(self._disk, folder.path / MANIFEST, whole)
            folder.publish()
        except BaseException:
            folder.discard()
            raise
        return whole

    def receive(self, name: str, manifest: bytes, body: Iterable[bytes]) -> None:
        """Keep a checkpoint that comes from elsewhere, once all of it has been verified.

        Args:
            name: its name.
            manifest: the content of the manifest's file.
            body: that of the body's, in parts.

        Raises:
            InvalidRequestError: the name is none, or another checkpoint has it.
            DataLossError: it is damaged; nothing stays.
            OSError: the disk failed, or as `body`; nothing stays.
        """
        folder = self._new_folder(name)
        try:
            folder.make()
            write_new(self._disk, folder.path / BODY, body)
            write_new(self._disk, folder.path / MANIFEST, [manifest])
            with Checkpoint(self._disk, folder.path) as checkpoint:
                checkpoint.body.verify()
            folder.publish()
        except BaseException:
            folder.discard()
            raise

    def open(self, name: str) -> Checkpoint:
        """Open a checkpoint.

        Raises:
            InvalidRequestError: the name is none, or no checkpoint has it.
            DataLossError: it is damaged.
            OSError: the disk failed.
        """
        return Checkpoint(self._disk, self._existing(name))

    def verify(self, name: str) -> Manifest:
        """Read all of a checkpoint, and return its manifest.

        Raises:
            InvalidRequestError, OSError: as `open`.
            DataLossError: it is damaged; the error names the first array, in the order of the file, and its block.
        """
        with self.open(name) as checkpoint:
            checkpoint.body.verify()
            return checkpoint.manifest

    def newest(self, without: Collection[str] = ()) -> NewestCheckpoint:
        """Find the good checkpoint with the highest (step, load), and log those that are damaged.

        Args:
            without: names to pass over, such as one whose arrays turned out to be damaged.

        Raises:
            OSError: the disk failed. A checkpoint that cannot be read is not passed over.
        """
        found = [info for info in self.list() if info.name not in without]
        bad = tuple(info for info in found if info.damage is not None)
        for info in bad:
            _log.warning("checkpoint damaged", checkpoint=info.name, folder=str(self.folder), damage=info.damage)
        best = max((info for info in found if info.damage is None), key=lambda info: info.age, default=None)
        return NewestCheckpoint(None if best is None else self.open(best.name), bad)

    def delete(self, name: str) -> None:
        """Delete a checkpoint, or the rest of one whose deletion was interrupted.

        Raises:
            InvalidRequestError: the name is none, or no checkpoint has it.
            DataLossError: it is no folder.
            OSError: the disk failed; calling again goes on.
        """
        path = self._existing(name)
        if not is_folder(self._disk, path):
            raise damaged(path, "folder", "this is a symbolic link or a file, which is not deleted")
        remove_files(self._disk, path, MANIFEST)
        self._disk.sync_folder(self.folder)

    def prune(self, keep: int) -> tuple[str, ...]:
        """Delete automatic checkpoints but the newest good ones, and the remains of what was interrupted.

        Damaged ones stay, for whoever wants to know why, and do not count.

        Args:
            keep: the number of good automatic checkpoints that stay.

        Returns:
            The names that were removed.

        Raises:
            OSError: the disk failed; calling again goes on.
        """
        if keep < 0:
            raise ValueError(f"{keep} checkpoints cannot stay")
        removed = [name for name in self._names(NEW_PREFIX) if name not in self._writing]
        for name in removed:
            self._remove_leftover(name)
        automatic = [info for info in self.list() if info.name.startswith(AUTOMATIC_PREFIX)]
        good = sorted((info for info in automatic if info.damage is None), key=lambda info: info.age, reverse=True)
        half = [info.name for info in automatic if info.damage is not None and self._is_half_deleted(info.name)]
        for name in [*half, *(info.name for info in reversed(good[keep:]))]:
            self.delete(name)
            removed.append(name)
        return tuple(removed)

    def list(self) -> tuple[CheckpointInfo, ...]:
        """Return a line for each checkpoint, by name, the damaged ones with the reason.

        Raises:
            OSError: the disk failed.
        """
        names = [name for name in self._names("") if not name.startswith(".")]
        return tuple(info for name in names if (info := self._info(name)) is not None)

    def _info(self, name: str) -> CheckpointInfo | None:
        try:
            with Checkpoint(self._disk, self.folder / name) as checkpoint:
                return checkpoint.info()
        except DataLossError as error:
            return CheckpointInfo(name, damage=str(error))
        except FileNotFoundError:  # another call deleted it meanwhile
            return None

    def _names(self, prefix: str) -> tuple[str, ...]:
        if not self._disk.exists(self.folder):
            return ()
        if not is_folder(self._disk, self.folder):
            raise damaged(self.folder, "folder", "this is a symbolic link or a file")
        return tuple(name for name in self._disk.names(self.folder) if name.startswith(prefix))

    def _existing(self, name: str) -> pathlib.Path:
        """Return the folder of a checkpoint."""
        _check_name(name)
        names = [found for found in self._names("") if not found.startswith(".")]
        if name not in names:
            raise InvalidRequestError.of(
                "name", f"there is no checkpoint {name!r}; there are {', '.join(names[:20]) or 'none'}"
            )
        return self.folder / name

    def _new_folder(self, name: str) -> NewFolder:
        """Choose a folder for a new checkpoint; it is no leftover while it is under way."""
        _check_name(name)
        with contextlib.suppress(FileExistsError):
            if not self._disk.exists(self.folder):
                self._disk.make_folder(self.folder)
        if name in self._names(""):
            raise name_taken(name)
        self._disk.sync_folder(self.folder.parent)  # every time: the call that made it may have ended before this
        return NewFolder(self._disk, self.folder / name, MANIFEST, self._writing, self._work)

    def _is_half_deleted(self, name: str) -> bool:
        path = self.folder / name
        return is_folder(self._disk, path) and not self._disk.exists(path / MANIFEST)

    def _remove_leftover(self, name: str) -> None:
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):  # its writer ended meanwhile
            if is_folder(self._disk, path):
                remove_files(self._disk, path, MANIFEST)
            else:
                self._disk.remove(path)


def moment_of(info: CheckpointInfo) -> tuple[int, int]:
    """Return the step and the load of a checkpoint, of a damaged one as far as its name tells."""
    if info.damage is None:
        return info.step, info.load
    named = _AUTOMATIC.match(info.name)
    return (int(named[1]), int(named[2])) if named else (0, 0)


def automatic_name(step: int, load: int) -> str:
    """Return the name of an automatic checkpoint."""
    return f"{AUTOMATIC_PREFIX}{step:010d}-{load:06d}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequestError.of(
            "name",
            f"{name[:80]!r} is no name of a checkpoint; use 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-', no dot first",
        )
