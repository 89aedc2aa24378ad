"""One checkpoint: open, or being written."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stepwire_server.durability.body import BodyReader, BodyWriter
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.folders import NewFolder, is_folder
from stepwire_server.durability.manifest import Manifest, damaged, read_manifest, write_manifest

__all__ = ["BODY", "MANIFEST", "Checkpoint", "CheckpointInfo", "CheckpointWriter"]

MANIFEST: Final = "manifest.json"
BODY: Final = "state.safetensors"

# A file that is missing, or is something else than a file.
_NO_FILE: Final = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ESPIPE)


class CheckpointInfo(NamedTuple):
    """One line of a list of checkpoints.

    Attributes:
        name: the checkpoint's name.
        step: the last step in it; 0 if it is damaged.
        load: the last load in it; 0 if it is damaged.
        created: the time of its creation, ISO 8601; empty if it is damaged.
        nbytes: the bytes of its files; 0 if it is damaged.
        damage: the reason why it cannot be used; None for a good one, as far as its manifest and its body's head tell.
        acquired: the generation in which the client of its hold acquired the worker; 0 if it is damaged.
        stored: an object store has it.
        store_problem: the reason why its last upload there failed; empty without one.
    """

    name: str
    step: int = 0
    load: int = 0
    created: str = ""
    nbytes: int = 0
    damage: str | None = None
    acquired: int = 0
    stored: bool = False
    store_problem: str = ""

    @property
    def age(self) -> tuple[int, int, int, str, str]:
        """A key by which older checkpoints come first."""
        return (self.step, self.load, self.acquired, self.created, self.name)


class Checkpoint:
    """An open checkpoint. A context manager.

    Attributes:
        name: its name.
        manifest: its numbers.
        body: its arrays.
        nbytes: the bytes of its files.
    """

    def __init__(self, disk: Disk, folder: pathlib.Path) -> None:
        """Open a checkpoint, and check all but the elements of its arrays, which `body` checks as it reads.

        Raises:
            DataLossError: it is damaged.
            OSError: the disk failed.
        """
        if not is_folder(disk, folder):
            raise damaged(folder, "folder", "this is a symbolic link or a file")
        self.name = folder.name
        with _about(folder / MANIFEST):
            self.manifest, manifest_bytes = read_manifest(disk, folder / MANIFEST)
        with _about(folder / BODY):
            self.body = BodyReader(disk, folder / BODY, self.manifest.arrays)
        self.nbytes = manifest_bytes + self.body.nbytes

    def info(self) -> CheckpointInfo:
        """Return its line in a list."""
        manifest = self.manifest
        return CheckpointInfo(
            self.name, manifest.step, manifest.load, manifest.created, self.nbytes, acquired=manifest.acquired
        )

    def close(self) -> None:
        """Close the body. Closing twice is harmless."""
        self.body.close()

    def __enter__(self) -> Checkpoint:
        """Use it for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class CheckpointWriter:
    """A checkpoint that is being written. One thread uses it, and ends it by `commit` or `abort`."""

    def __init__(self, disk: Disk, folder: NewFolder, name: str, slots: Mapping[str, int]) -> None:
        """Make the folder and the body in it.

        Raises:
            OSError: the disk failed; nothing stays.
        """
        self._disk = disk
        self._folder = folder
        self._name = name
        self._body: BodyWriter | None = None
        try:
            folder.make()
            self._body = BodyWriter(disk, folder.path / BODY, slots)
        except BaseException:
            self.abort()
            raise

    def write(self, slot: str, start: int, values: npt.NDArray[np.float32]) -> None:
        """See `BodyWriter.write`."""
        assert self._body is not None
        self._body.write(slot, start, values)

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete the checkpoint; it is there for good when this returns.

        Args:
            manifest: its numbers; name and arrays are filled in.

        Returns:
            The manifest as it was written.

        Raises:
            InvalidRequestError: another checkpoint has got the name meanwhile.
            OSError: the disk failed.
            ValueError: a block was not written, or the manifest's config is no JSON.

        After an error there is no such checkpoint, and `abort` was called.
        """
        assert self._body is not None
        try:
            whole = msgspec.structs.replace(manifest, name=self._name, arrays=self._body.finish())
            write_manifest(self._disk, self._folder.path / MANIFEST, whole)
            self._folder.publish()
        except BaseException:
            self.abort()
            raise
        self._body = None
        return whole

    def abort(self) -> None:
        """Remove what was written. Harmless after `commit`, and twice."""
        if self._body is not None:
            self._body.abort()
            self._body = None
        self._folder.discard()


@contextlib.contextmanager
def _about(path: pathlib.Path) -> Iterator[None]:
    """Take a file that is none for damage, and name the file in every other error of the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_FILE:
            raise damaged(path, "file", f"this is no file: {os.strerror(error.errno or 0)}") from None
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
