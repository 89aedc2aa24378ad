"""The claims of a shard: files that are created exclusively, so that one server at a time may speak for its sessions.

    DIR/.claims/NAME/0000000000000003      {"epoch": 3, "server": "…", "standby": "…", "endpoint": "host:port"}

Each change of who may speak is the next number: a primary that begins, a standby that has all, a primary that goes on
alone, a standby that is promoted. Whoever wants to change creates the number behind the one that it knows. Two that
want to at a time want the same number, and one of them gets it. So a standby that was left behind cannot be promoted,
and a primary cannot go on alone once its standby was.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError

__all__ = ["KEPT", "Claim", "Claims"]

KEPT: Final = 8
"""The claims that stay, the newest ones."""

_FOLDER: Final = ".claims"
_NUMBER: Final = re.compile(r"[0-9a-f]{16}")


class Claim(NamedTuple):
    """One claim.

    Attributes:
        epoch: its number; 0 for none.
        server: the id of the server that may speak; empty for one that has ended and left nothing.
        standby: the id of the standby that may be promoted; empty for none.
        endpoint: the server's address for clients.
    """

    epoch: int = 0
    server: str = ""
    standby: str = ""
    endpoint: str = ""


class Claims:
    """The claims of one shard, in a directory that primary and standby see. Every method raises OSError."""

    def __init__(self, directory: pathlib.Path, shard: str) -> None:
        """Read and write a folder; it is made with the first claim."""
        self._folder, self._shard = directory / _FOLDER / shard, shard

    def newest(self) -> Claim:
        """Return the newest claim; one of epoch 0 before the first.

        Raises:
            InvalidRequestError: the newest file is no claim.
        """
        while names := self._names():
            place = self._folder / names[-1]
            try:
                found = json.loads(place.read_text())
                return Claim(int(names[-1], 16), str(found["server"]), str(found["standby"]), str(found["endpoint"]))
            except FileNotFoundError:  # many newer ones have come between the two looks
                continue
            except (ValueError, LookupError, TypeError) as problem:
                raise InvalidRequestError.of(
                    "directory", f"{place} is no claim: {problem}; remove it once no server runs"
                ) from None
        return Claim()

    def make(self, claim: Claim) -> bool:
        """Create a claim; return False if its number is another server's, or a newer one is there.

        The oldest claims go. So a number may have been in use and removed long ago, which the newest claim tells.

        Args:
            claim: its epoch is the one behind the newest that the caller knows.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = self._folder / f".new-{secrets.token_hex(8)}"
        place = self._folder / f"{claim.epoch:016x}"
        try:
            with open(whole, "x", encoding="utf-8") as file:
                file.write(json.dumps(claim._asdict()) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(whole, place)
        except FileExistsError:
            return self.newest() == claim
        finally:
            whole.unlink(missing_ok=True)
        if self.newest().epoch != claim.epoch:
            return False
        for name in self._names()[:-KEPT]:
            (self._folder / name).unlink(missing_ok=True)
        return True

    def begin(self, server: str, endpoint: str) -> Claim:
        """Claim a shard that nobody speaks for.

        Raises:
            InvalidRequestError: another server speaks for it, or is about to.
        """
        newest = self.newest()
        claim = Claim(newest.epoch + 1, server, "", endpoint)
        if newest.server or not self.make(claim):
            newest = self.newest()
            raise InvalidRequestError.of(
                "shard",
                f"the sessions of {self._shard!r} are with the server at {newest.endpoint} since epoch {newest.epoch}"
                f"{', and with its standby' if newest.standby else ''}: start this server with --standby-of, promote "
                "the standby, or give the sessions up by `stepwire standby disown`",
            )
        return claim

    def release(self, epoch: int) -> None:
        """Say that nobody speaks for the shard behind an epoch: its sessions have ended, or are given up."""
        self.make(Claim(epoch + 1))

    def _names(self) -> list[str]:
        """Return the names of all claims, by rising number."""
        try:
            return sorted(path.name for path in self._folder.iterdir() if _NUMBER.fullmatch(path.name))
        except FileNotFoundError:
            return []
