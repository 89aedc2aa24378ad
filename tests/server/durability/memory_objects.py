"""An object store in memory, which fails, or ends its caller, at any call."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stepwire_server.durability.object_store import ObjectStoreError

__all__ = ["At", "Gone", "MemoryObjects", "away", "ended"]


class Gone(BaseException):
    """The end of the process that makes a call."""


class At:
    """Something that happens at one call.

    Attributes:
        left: the calls until then; below 1 once it has happened.
    """

    def __init__(self, number: int, happening: Callable[[], object], *, afterwards: bool = False) -> None:
        """Happen before the call of a number, or after it."""
        self.left, self.afterwards = number, afterwards
        self._happening = happening

    def __call__(self, *, after: bool) -> None:
        """Count a call."""
        self.left -= after == self.afterwards
        if self.left == 0 and after == self.afterwards:
            self.left = -1
            self._happening()


class MemoryObjects:
    """Objects by their keys; see `ObjectStore`."""

    url = "memory://"

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content: dict[str, bytes] = {} if content is None else content
        self.at: At | None = None
        self._lock = threading.RLock()

    def beside(self) -> MemoryObjects:
        """Return the same store, as another server reaches it."""
        return MemoryObjects(self.content)

    def create(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            return self.content.setdefault(key, data) == data

        return self._call(put)

    def put(self, key: str, data: bytes) -> None:
        self._call(lambda: self.content.__setitem__(key, data))

    def upload(self, key: str, file: io.RawIOBase, nbytes: int) -> None:
        data = file.read()
        assert data is not None
        assert len(data) == nbytes
        self.put(key, data)

    def read(self, key: str, most: int) -> bytes:
        return b"".join(self.parts(key))

    def parts(self, key: str) -> Iterator[bytes]:
        data = self._call(lambda: self.content.get(key))
        if data is None:
            raise FileNotFoundError(key)
        yield data[: len(data) // 2]
        yield data[len(data) // 2 :]

    def keys(self, prefix: str) -> list[str]:
        return self._call(lambda: sorted(key for key in self.content if key.startswith(prefix)))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._call(lambda key=key: self.content.pop(key, None))

    def _call(self, call: Callable[[], Any]) -> Any:
        if self.at is not None:
            self.at(after=False)
        result = call()
        if self.at is not None:
            self.at(after=True)
        return result


def away() -> None:
    """Fail as a store does that cannot be reached."""
    raise ObjectStoreError("the store is away")


def ended() -> None:
    """End the caller."""
    raise Gone
