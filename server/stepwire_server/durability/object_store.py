"""An object store: the one module that knows obstore, which is loaded when a store is opened.

Credentials are obstore's concern: it finds them in the environment, in files, or with the machine. A URL holds none,
and the text of an error loses whatever might.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any, Final

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError

__all__ = ["ObjectStore", "ObjectStoreError"]

SCHEMES: Final = ("s3", "gs", "az", "file")

_PART_BYTES: Final = 8 << 20
_PARTS_AT_A_TIME: Final = 2
_MOST_PARTS: Final = 9_000  # S3 accepts 10,000
_RETRIES: Final = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=30)}
_QUERY: Final = re.compile(r"\?[^\s\"')]*")  # a signature may be there


class ObjectStoreError(OSError):
    """A store that refused a call, or could not be reached."""


class MissingObjectError(ObjectStoreError, FileNotFoundError):
    """An object that is not there."""


class ObjectStore:
    """Objects by their keys, below the prefix of a URL. Thread-safe.

    A failure is an ObjectStoreError, and with a missing object a FileNotFoundError too.

    Attributes:
        url: the place, without any credential.
    """

    def __init__(self, store: Any, url: str) -> None:
        """Use a store of obstore's."""
        self._obstore: Any = _loaded("obstore")
        self._exceptions: Any = _loaded("obstore.exceptions")
        self._store = store
        self.url = url

    @classmethod
    def open(cls, url: str) -> ObjectStore:
        """Open a store, without a call to it.

        Raises:
            InvalidRequestError: the URL names none, or holds a credential.
            UnsupportedFeatureError: obstore is not installed.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in SCHEMES or not (parts.netloc or parts.scheme == "file") or parts.query or parts.fragment:
            raise InvalidRequestError.of("checkpoint_store", f"it is no URL of {', '.join(SCHEMES)}://bucket/prefix")
        if "@" in parts.netloc:
            raise InvalidRequestError.of(
                "checkpoint_store", "the URL holds a credential; give it in the environment, as obstore reads it"
            )
        options: dict[str, Any] = {"mkdir": True} if parts.scheme == "file" else {"retry_config": _RETRIES}
        module = _loaded("obstore.store")
        try:
            return cls(module.from_url(url, **options), url)
        except Exception as error:  # whatever a builder of obstore's raises for a wrong setting
            raise InvalidRequestError.of("checkpoint_store", f"{url} cannot be opened: {_told(error)}") from None

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; False if there is another one of this key."""
        try:
            with self._failing(f"create {key}"):
                self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except _ExistsError:  # by a first attempt of this call, perhaps, whose reply was lost
            return self.read(key, len(data)) == data
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write an object, in the place of one that has the key."""
        with self._failing(f"write {key}"):
            self._obstore.put(self._store, key, data, use_multipart=False)

    def upload(self, key: str, file: io.RawIOBase, nbytes: int) -> None:
        """Write an object from a file of so many bytes: in parts, of which a few are in memory at a time."""
        part = max(_PART_BYTES, -(-nbytes // _MOST_PARTS))
        with self._failing(f"write {key}"):
            self._obstore.put(self._store, key, file, chunk_size=part, max_concurrency=_PARTS_AT_A_TIME)

    def read(self, key: str, most: int) -> bytes:
        """Return an object of at most so many bytes; of a longer one, a part that is longer than that."""
        data = bytearray()
        for part in self.parts(key):
            data += part
            if len(data) > most:
                break
        return bytes(data)

    def parts(self, key: str) -> Iterator[bytes]:
        """Yield the content of an object, in order."""
        with self._failing(f"read {key}"):
            for part in self._obstore.get(self._store, key).stream(min_chunk_size=_PART_BYTES):
                yield bytes(part)

    def modified(self, key: str) -> float:
        """Return the time of an object's writing by the clock of the store, in seconds since 1970."""
        with self._failing(f"look at {key}"):
            found: datetime.datetime = self._obstore.head(self._store, key)["last_modified"]
        return found.timestamp()

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a prefix, which ends with a slash, sorted."""
        with self._failing(f"list {prefix}"):
            listed = self._obstore.list(self._store, prefix=prefix)
            return sorted(meta["path"] for metas in listed for meta in metas)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, one after the other; it is no failure that one is missing."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError), self._failing(f"delete {key}"):
                self._obstore.delete(self._store, key)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._exceptions.AlreadyExistsError:
            raise _ExistsError from None
        except FileNotFoundError:
            raise MissingObjectError(f"{self.url}: {what}: there is no such object, or no such place") from None
        except (self._exceptions.BaseError, OSError, ValueError) as error:
            raise ObjectStoreError(f"{self.url}: {what}: {_told(error)}") from None


class _ExistsError(Exception):
    """An object of the key exists."""


def _loaded(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnsupportedFeatureError(
            "--checkpoint-store needs obstore, which is not installed: pip install obstore",
            metadata={"feature": "checkpoint_store"},
        ) from None


def _told(error: Exception) -> str:
    """Return the first lines of an error of obstore's, which tells its internals behind them."""
    return _QUERY.sub("?…", str(error).partition("\n\n")[0])[:500]
