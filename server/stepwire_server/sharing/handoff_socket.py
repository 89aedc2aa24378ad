"""The Unix socket that hands memory over: where it lies, and who can reach it."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from stepwire_server.config import ENVIRONMENT

__all__ = ["HandoffListener"]

_NAME: Final = "handoff.sock"
_BACKLOG: Final = 128


class HandoffListener:
    """A listening SOCK_SEQPACKET socket and what it leaves on the disk until `close`. Closes twice without complaint.

    Everybody who can connect is checked by the kernel's word for their user, so the permissions are a second wall: they
    shut out all other users, unless some were named who would not get to the socket otherwise.

    Attributes:
        path: where it listens.
        socket: closed by whom it is given to.
    """

    def __init__(
        self, path: str, claim: Callable[[str], AbstractContextManager[None]], uids: Sequence[int] = ()
    ) -> None:
        """Listen.

        Args:
            path: where; empty for a private folder under `$XDG_RUNTIME_DIR` or the folder for temporary files.
            claim: makes room for a socket that is bound in its block, for this user alone.
            uids: other users that may connect.

        Raises:
            OSError: there is no such folder, or no room in it.
            InvalidRequestError: the path is taken.
        """
        self._folder = None if path else _private_folder(uids)
        self._removed = False
        self.path = path or str(pathlib.Path(self._folder or "", _NAME))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with claim(self.path):
                self.socket.bind(self.path)
            if uids:
                os.chmod(self.path, 0o666)
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.socket.close()
            self._remove_folder()
            raise

    def close(self) -> None:
        """Remove the socket from the disk, while it still listens: nobody puts another in the place of a live one."""
        if not self._removed:
            self._removed = True
            pathlib.Path(self.path).unlink(missing_ok=True)
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder(uids: Sequence[int]) -> str:
    """Make a folder of mode 0700; one that other named users can go through has 0711."""
    runtime = ENVIRONMENT.get("XDG_RUNTIME_DIR", "")
    # The folder of this user's session is closed to all others.
    usable = runtime and not uids and os.access(runtime, os.W_OK | os.X_OK)
    folder = tempfile.mkdtemp(prefix="stepwire-", dir=runtime if usable else None)
    if uids:
        os.chmod(folder, 0o711)
    return folder
