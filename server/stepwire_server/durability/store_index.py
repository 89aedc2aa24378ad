"""The index of an object store: the list of sessions and checkpoints that count, and the keys of their objects.

```
PREFIX/epochs/EPOCH                                      one object an owner, created exclusively
PREFIX/index/EPOCH-NUMBER                                the list as that owner wrote it, created exclusively
PREFIX/sessions/ID/session.json
PREFIX/sessions/ID/checkpoints/NAME/EPOCH-NUMBER/state.safetensors, manifest.json
```

An object that the index does not name counts for nothing. A newer owner goes on from the last index of the one before,
which it reads after it has created its own epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import google_crc32c
import msgspec

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.moved import MovedSession
from stepwire_server.durability.object_store import ObjectStore

__all__ = ["StoreIndex", "StoredCheckpoint", "epoch_of", "index_key", "newest_index", "session_folder", "write_index"]

INDEX: Final = "index/"
SESSIONS: Final = "sessions/"

_MOST_BYTES: Final = 256 << 20
_UPLOAD: Final = re.compile(r"sessions/[0-9a-f]{32}/checkpoints/[^/]+/([0-9a-f]{16})-\d+/[^/]+")


class StoredCheckpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint in a store.

    Attributes:
        folder: the beginning of the keys of its objects, with a slash at the end.
        step: the last step in it.
        load: the last load in it.
        acquired: the generation in which the client of its hold acquired the worker.
        created: the time of its creation, ISO 8601.
        body_bytes: the bytes of its arrays' object.
        manifest_crc32c: the CRC32C of its manifest's object, by which the one on the disk is known.
    """

    folder: str
    step: int
    load: int
    acquired: int
    created: str
    body_bytes: int
    manifest_crc32c: int

    @property
    def age(self) -> tuple[int, int, int, str]:
        """A key by which older checkpoints come first."""
        return (self.step, self.load, self.acquired, self.created)


class StoreIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version of the list.

    Attributes:
        directory: the id of the data directory whose server wrote it.
        sessions: for each session its checkpoints, by name.
        moved: the records of the sessions that live on elsewhere, as texts, by their ids. None is among `sessions`.
        crc32c: the CRC32C of the text with 0 here.
        format: the version of the format.
    """

    directory: str
    sessions: dict[str, dict[str, StoredCheckpoint]] = {}
    moved: dict[str, str] = {}
    crc32c: int = 0
    format: int = 1

    def with_checkpoints(self, session_id: str, checkpoints: dict[str, StoredCheckpoint]) -> StoreIndex:
        """Return the list with other checkpoints of a session; with none, or for one that has moved, without it."""
        sessions = {key: value for key, value in self.sessions.items() if key != session_id}
        if checkpoints and session_id not in self.moved:
            sessions[session_id] = checkpoints
        return msgspec.structs.replace(self, sessions=sessions)

    def with_moved(self, records: Iterable[MovedSession]) -> StoreIndex:
        """Return the list with other records of sessions that live on elsewhere, and without their checkpoints."""
        moved = {each.session_id: each.text() for each in records}
        sessions = {key: value for key, value in self.sessions.items() if key not in moved}
        return msgspec.structs.replace(self, moved=moved, sessions=sessions)


def index_key(epoch: int, number: int) -> str:
    """Return the key of an owner's index, by the number of its writing."""
    return f"{INDEX}{epoch:016x}-{number:012d}"


def session_folder(session_id: str) -> str:
    """Return the beginning of the keys of a session's objects."""
    return f"{SESSIONS}{session_id}/"


def epoch_of(key: str) -> int | None:
    """Return the epoch of the owner that uploaded a checkpoint's object; None for another object."""
    found = _UPLOAD.fullmatch(key)
    return int(found[1], 16) if found else None


def write_index(objects: ObjectStore, key: str, index: StoreIndex) -> None:
    """Write an index under a key that is free.

    Raises:
        OSError: the store failed, or the key is not free.
    """
    plain = msgspec.structs.replace(index, crc32c=0)
    whole = msgspec.structs.replace(index, crc32c=int(google_crc32c.value(msgspec.json.encode(plain, order="sorted"))))
    if not objects.create(key, msgspec.json.encode(whole, order="sorted")):
        raise FileExistsError(f"{objects.url}: {key} exists")


def newest_index(objects: ObjectStore) -> StoreIndex | None:
    """Read the newest index; None where there is none yet.

    Raises:
        DataLossError: it is damaged.
        OSError: the store failed.
    """
    while keys := objects.keys(INDEX):
        try:
            return _decoded(objects, keys[-1])
        except FileNotFoundError:  # its writer has put a newer one in its place
            continue
    return None


def _decoded(objects: ObjectStore, key: str) -> StoreIndex:
    text = objects.read(key, _MOST_BYTES)
    try:
        index = msgspec.json.decode(text, type=StoreIndex)
        # Of the fields that the text has: its writer may know fewer than this release.
        plain = msgspec.json.encode(msgspec.json.decode(text) | {"crc32c": 0}, order="sorted")
        problem = "" if google_crc32c.value(plain) == index.crc32c else "its checksum is another one"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem:
        raise DataLossError(
            f"{objects.url}: {key} is no index: {problem}; delete this object, and the one before it counts",
            reason=Reason.CHECKPOINT_DAMAGED,
            metadata={"path": key},
        )
    return index
