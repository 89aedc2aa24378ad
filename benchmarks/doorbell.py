"""The floor of a small step on one host: a datagram of 64 bytes, and one back.

`python doorbell.py` replies to datagrams on a Unix socket until its standard input ends. The process prints the path.
Both sides block in the kernel, and nothing else happens: no optimizer, no gRPC, no copy of arrays.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator

from child import child, python

__all__ = ["Doorbell", "doorbell_process"]

_MESSAGE = bytes(64)


class Doorbell:
    """One connection to the doorbell."""

    def __init__(self, path: str) -> None:
        """Connect."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)

    def ring(self) -> int:
        """Send a datagram, and return the size of the one that comes back."""
        self._socket.send(_MESSAGE)
        return len(self._socket.recv(2 * len(_MESSAGE)))

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()


@contextlib.contextmanager
def doorbell_process() -> Iterator[str]:
    """Run the doorbell as a process of its own, and yield its path."""
    with child(python(__file__)) as process:
        yield process.read()


def serve() -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        path = str(pathlib.Path(folder, "socket"))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind(path)
        listening.listen()
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        print(path, flush=True)
        sys.stdin.read()


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_reply, args=(connection,), daemon=True).start()


def _reply(connection: socket.socket) -> None:
    with connection:
        while message := connection.recv(2 * len(_MESSAGE)):
            connection.send(message)


if __name__ == "__main__":
    serve()
