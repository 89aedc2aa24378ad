"""The Unix socket of the handoff: its path and its permissions."""

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

__all__ = ["HandoffSocket"]

_NAME: Final = "handoff.sock"
_BACKLOG: Final = 128


class HandoffSocket:
    """A listening SOCK_SEQPACKET socket, with its path on the disk until `close`. Closes twice without complaint.

    The handoff server checks the user of every connection, as the kernel reports the user. The permissions are a second
    wall: they shut out all other users, unless the server's settings name users that may connect.

    Attributes:
        path: the path of the socket.
        socket: the socket; its user closes it.
    """

    def __init__(
        self, path: str, claim: Callable[[str], AbstractContextManager[None]], uids: Sequence[int] = ()
    ) -> None:
        """Listen.

        Args:
            path: the path; empty for a private folder under `$XDG_RUNTIME_DIR` or the folder for temporary files.
            claim: a context manager that claims the path for this user alone; the socket is bound in its block.
            uids: other users that may connect.

        Raises:
            OSError: the folder does not exist, or the disk is full.
            InvalidRequestError: the path is in use.
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
        """Remove the path from the disk before the socket is closed: no other server replaces a live socket."""
        if not self._removed:
            self._removed = True
            pathlib.Path(self.path).unlink(missing_ok=True)
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder(uids: Sequence[int]) -> str:
    """Return a new folder of mode 0700; of mode 0711 with other users, so that they reach the socket in it."""
    runtime = ENVIRONMENT.get("XDG_RUNTIME_DIR", "")
    # The folder of this user's session is closed to all others.
    usable = runtime and not uids and os.access(runtime, os.W_OK | os.X_OK)
    folder = tempfile.mkdtemp(prefix="stepwire-", dir=runtime if usable else None)
    if uids:
        os.chmod(folder, 0o711)
    return folder
