"""The epochs of an object store: keys that are created once, of which the newest owns the store."""

from __future__ import annotations

import json
import os
import socket
from typing import Final

from stepwire_server.durability.object_store import ObjectStore

__all__ = ["StoreEpochs"]

EPOCHS: Final = "epochs/"
KEPT: Final = 8


class StoreEpochs:
    """The epochs of a store. Every method raises OSError if the store fails."""

    def __init__(self, objects: ObjectStore) -> None:
        """Acquire nothing yet."""
        self._objects = objects

    def acquire(self, after: int, instance: str) -> int:
        """Create a new epoch, and return its number: every older owner is fenced from then on.

        Args:
            after: a number that is smaller than the new one.
            instance: an id of the owner.
        """
        epoch = max(after, self.newest()) + 1
        about = {"pid": os.getpid(), "host": socket.gethostname(), "instance": instance}
        while not self._objects.create(self._key(epoch), json.dumps(about).encode()):
            epoch = max(epoch, self.newest()) + 1
        self._objects.delete([key for key in self._objects.keys(EPOCHS)[:-KEPT] if key < self._key(epoch)])
        return epoch

    def newest(self) -> int:
        """Return the newest epoch; 0 before the first."""
        keys = self._objects.keys(EPOCHS)  # of one length, so sorted as their numbers are
        return int(keys[-1].removeprefix(EPOCHS), 16) if keys else 0

    def _key(self, epoch: int) -> str:
        return f"{EPOCHS}{epoch:016x}"
