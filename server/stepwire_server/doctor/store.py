"""The check of an object store for checkpoints: it answers, creates a key once, lists what was written, and deletes."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Final

from stepwire.errors import StepwireError, UnsupportedFeatureError
from stepwire_server.doctor.disk import existing_above
from stepwire_server.durability.object_store import ObjectStore, ObjectStoreError
from stepwire_server.engines.probe import Finding

__all__ = ["examine_checkpoint_store"]

_CHECK: Final = "object store"
_FOLDER: Final = "doctor/"
_ONE, _OTHER = b"one", b"other"

_MOST_SECONDS: Final = 60.0
"""The difference of two clocks from which it is told: stores refuse signatures and tokens of other minutes."""

_REMEDIES: Final = {
    "s3": "check the bucket, AWS_REGION, AWS_ENDPOINT, and the credentials: AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or those of the machine. They need GetObject, PutObject, DeleteObject and ListBucket",
    "gs": "check the bucket, and the credentials: GOOGLE_SERVICE_ACCOUNT names the file of a key, or those of the "
    "machine. They need storage.objects.create, get, list and delete",
    "az": "check the container, AZURE_STORAGE_ACCOUNT_NAME, and the credentials: AZURE_STORAGE_ACCOUNT_KEY, or those "
    "of the machine. They need the role Storage Blob Data Contributor",
    "file": "name another folder in --checkpoint-store, or make it this user's",
}


def examine_checkpoint_store(url: str, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Check the setting `checkpoint_store`; nothing is left behind. Without one there is no finding.

    Args:
        url: the setting.
        clock: returns seconds since 1970.
    """
    if not url:
        return []
    scheme = urllib.parse.urlsplit(url).scheme
    try:
        with _place_of(url) as place:
            return [_examined(ObjectStore.open(place), url, clock)]
    except UnsupportedFeatureError as problem:
        return [Finding(_CHECK, False, str(problem), "pip install obstore")]
    except (StepwireError, OSError) as problem:
        return [Finding(_CHECK, False, str(problem), _REMEDIES.get(scheme, "name a store of s3, gs, az or file"))]


@contextlib.contextmanager
def _place_of(url: str) -> Iterator[str]:
    """Yield the place of the check: a folder is examined in a new one beside it, since opening it would make it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "file":
        yield url
        return
    above = existing_above(pathlib.Path(urllib.parse.unquote(parts.path)))
    with tempfile.TemporaryDirectory(dir=above, prefix=".stepwire-") as folder:
        yield pathlib.Path(folder).as_uri()


def _examined(objects: ObjectStore, url: str, clock: Callable[[], float]) -> Finding:
    """Try all that the owner of a store needs.

    Raises:
        ObjectStoreError: the store refused a call, or could not be reached.
    """
    key = f"{_FOLDER}{secrets.token_hex(8)}"
    began, now = time.perf_counter(), clock()
    objects.create(key, _ONE)
    try:
        seconds = time.perf_counter() - began
        twice = objects.create(key, _OTHER)
        listed, read, ahead = key in objects.keys(_FOLDER), objects.read(key, len(_OTHER)), objects.modified(key) - now
    except BaseException:
        with contextlib.suppress(ObjectStoreError):
            objects.delete([key])
        raise
    objects.delete([key])
    if twice or read != _ONE:
        problem = f"{url} creates a key that exists: two servers would both own the store"
        return Finding(_CHECK, False, problem, "use a store with conditional writes (If-None-Match)")
    if not listed or key in objects.keys(_FOLDER):
        problem = f"{url} lists keys as they were before: an owner would not see the next one"
        return Finding(_CHECK, False, problem, "use a store with consistent lists, and no cache in front of it")
    if abs(ahead) > _MOST_SECONDS:
        problem = f"the clock of {url} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        return Finding(_CHECK, False, problem, "set the clocks: timedatectl set-ntp true", optional=True)
    return Finding(_CHECK, True, f"{url} creates each key once, a small object in {seconds * 1e3:.3g} ms")
