"""The directory of shards: a folder that all machines see, with a file for each time that a server began to serve one.

    DIR/NAME/0000000000000003           {"endpoint": "host:port", "epoch": 3, "durable_steps": {"~6a0c…": 12}}
    DIR/NAME/0000000000000003.ended     there once the shard has ended for good, with that epoch

A file is created whole and never changes, and the newest epoch of a shard is where its clients go. The oldest files go
with each new one. The directory may be old: then a client comes to a server that another one has overtaken. That server
says so by the epochs of its data directory, and answers nothing. So the directory is a hint, and no part of what makes
steps exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import secrets
from collections.abc import Mapping
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError, Reason, UnavailableError

__all__ = ["KEPT", "RAY_ACTOR", "RAY_NAMESPACE", "SCHEME", "ShardDirectory", "ShardEntry"]

SCHEME: Final = "directory:"
"""The beginning of a client's target that names a directory."""

RAY_NAMESPACE: Final = "stepwire"
"""The namespace of the actors of a Ray cluster."""

RAY_ACTOR: Final = "directory"
"""The name of the actor that reads the directory of a Ray cluster."""

KEPT: Final = 8
"""The entries of a shard that stay, the newest ones."""

_SHARD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EPOCH: Final = re.compile(r"[0-9a-f]{16}")
_ENDED: Final = ".ended"


class ShardEntry(NamedTuple):
    """An entry of the directory.

    Attributes:
        epoch: the epoch that it is of.
        endpoint: the server's address for clients, `host:port`.
        durable_steps: the last durable step of each session as the epoch began, by the digest of its id in log lines.
    """

    epoch: int
    endpoint: str
    durable_steps: Mapping[str, int]


class ShardDirectory:
    """The directory in a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Read and write a folder; it may be made later."""
        self._folder = folder

    def announce(self, shard: str, epoch: int, endpoint: str, durable_steps: Mapping[str, int] | None = None) -> None:
        """Say where a shard is served from an epoch on. Saying the same again is harmless.

        Args:
            shard: the name of the shard.
            epoch: the epoch of the server's data directory.
            endpoint: the server's address for clients, `host:port`.
            durable_steps: as in `ShardEntry`; None for none.

        Raises:
            InvalidRequestError: the shard cannot have that name, or the epoch was announced with another address.
            OSError: the folder cannot be written.
        """
        if not _SHARD.fullmatch(shard):
            raise InvalidRequestError.of(
                "shard", f"{shard!r:.80} is no name of a shard: up to 64 letters, digits, '.', '_' and '-'"
            )
        folder = self._folder / shard
        folder.mkdir(parents=True, exist_ok=True)
        place, entry = folder / f"{epoch:016x}", {"endpoint": endpoint, "epoch": epoch}
        content = json.dumps(entry | ({"durable_steps": dict(durable_steps)} if durable_steps else {})) + "\n"
        whole = folder / f".new-{secrets.token_hex(8)}"
        whole.write_text(content)
        try:
            os.link(whole, place)
        except FileExistsError:
            if place.read_text() != content:
                raise InvalidRequestError.of(
                    "shard", f"epoch {epoch} of shard {shard!r} was announced by another server; name another shard"
                ) from None
        finally:
            with contextlib.suppress(OSError):
                whole.unlink()
        self._forget_old(folder)

    def _forget_old(self, folder: pathlib.Path) -> None:
        """Remove the oldest entries of a shard. The newest stays: an old one that comes again tells nobody anything."""
        for name in _epochs_in(folder)[:-KEPT]:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
                (folder / f"{name}{_ENDED}").unlink(missing_ok=True)

    @property
    def is_of_one_shard(self) -> bool:
        """The folder has the entries of one shard, and is below a directory."""
        try:
            return any(_EPOCH.fullmatch(path.name) and path.is_file() for path in self._folder.iterdir())
        except OSError:
            return False

    def end(self, shard: str, epoch: int) -> None:
        """Say that a shard has ended with an epoch: a server that begins a later one brings it back.

        Raises:
            OSError: the folder cannot be written.
        """
        (self._folder / shard / f"{epoch:016x}{_ENDED}").touch()

    def has_ended(self, shard: str) -> bool:
        """Tell whether a shard has ended with its newest epoch."""
        try:
            return (self._folder / shard / f"{self.newest(shard)[0]:016x}{_ENDED}").exists()
        except UnavailableError:
            return False

    def shards(self) -> list[str]:
        """Return the names of the shards that were announced, and have not ended, sorted.

        Raises:
            UnavailableError: there is none yet.
        """
        try:
            names = [path.name for path in self._folder.iterdir() if _SHARD.fullmatch(path.name) and path.is_dir()]
            found = sorted(name for name in names if not self.has_ended(name))
        except OSError:
            found = []
        if not found:
            raise UnavailableError(
                f"the directory {str(self._folder)!r} names no shard; start servers with --directory and --shard",
                reason=Reason.UNREACHABLE,
            )
        return found

    def newest(self, shard: str) -> tuple[int, str]:
        """Return the newest epoch of a shard, and its endpoint.

        Raises:
            UnavailableError: as `entry`.
        """
        return self.entry(shard)[:2]

    def entry(self, shard: str) -> ShardEntry:
        """Return the newest entry of a shard.

        Raises:
            UnavailableError: nobody has announced it, or the directory cannot be read just now.
        """
        try:
            names = _epochs_in(self._folder / shard)
            found = json.loads((self._folder / shard / names[-1]).read_text())
            steps = {str(digest): int(step) for digest, step in found.get("durable_steps", {}).items()}
            return ShardEntry(int(names[-1], 16), str(found["endpoint"]), steps)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
            raise UnavailableError(
                f"the directory {str(self._folder)!r} does not tell where shard {shard!r} is: {problem}",
                reason=Reason.UNREACHABLE,
            ) from None


def _epochs_in(folder: pathlib.Path) -> list[str]:
    """Return the names of a shard's entries, by rising epoch."""
    return sorted(path.name for path in folder.iterdir() if _EPOCH.fullmatch(path.name))
