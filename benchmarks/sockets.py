"""The floor below gRPC: plain sockets moving the same bytes, over TCP and over a Unix socket.

`python sockets.py [HOST]` serves both until its standard input ends, and prints `PORT PATH`. A request names its order
and its bytes each way: all up and then all down, or each block back as it comes.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import NamedTuple

from child import child, python

__all__ = ["Addresses", "SocketStream", "addresses", "socket_server"]

_REQUEST = struct.Struct("<?QQ")
_BLOCK_BYTES = 1 << 20
# A message of this size fits into the buffers of both sockets, so that one thread can send it.
_SMALL_BYTES = 64 << 10
_BUFFER_BYTES = 4 << 20


class Addresses(NamedTuple):
    """The addresses of the server.

    Attributes:
        tcp: the host and the port.
        unix: the path.
    """

    tcp: tuple[str, int]
    unix: str


class SocketStream:
    """One connection to the server."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        """Connect: to host and port, or to a path."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.connect(address)
        _quicken(self._socket)

    def push_pull(self, up: memoryview, down: memoryview) -> None:
        """Send all of one buffer, then receive all of another."""
        self._socket.sendall(_REQUEST.pack(False, len(up), len(down)))
        self._socket.sendall(up)
        _receive(self._socket, down)

    def duplex(self, up: memoryview, down: memoryview) -> None:
        """Send all of one buffer and receive it back meanwhile, into another of its size."""
        self._socket.sendall(_REQUEST.pack(True, len(up), len(down)))
        if len(up) <= _SMALL_BYTES:
            self._socket.sendall(up)
            _receive(self._socket, down)
            return
        sender = threading.Thread(target=self._socket.sendall, args=(up,))
        sender.start()
        _receive(self._socket, down)
        sender.join()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()


@contextlib.contextmanager
def socket_server() -> Iterator[Addresses]:
    """Run the server as a process of its own on the loopback interface."""
    with child(python(__file__)) as process:
        yield addresses(process.read(), "127.0.0.1")


def addresses(printed: str, host: str) -> Addresses:
    """Return the addresses in the output of a server on a host."""
    port, path = printed.split(maxsplit=1)
    return Addresses((host, int(port)), path)


def serve(host: str) -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        path = str(pathlib.Path(folder, "socket"))
        tcp, unix = socket.create_server((host, 0)), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(path)
        unix.listen()
        for listening in (tcp, unix):
            threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        print(tcp.getsockname()[1], path, flush=True)
        sys.stdin.read()


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        _quicken(connection)
        threading.Thread(target=_reply, args=(connection,), daemon=True).start()


def _reply(connection: socket.socket) -> None:
    held, request = bytearray(), memoryview(bytearray(_REQUEST.size))
    with contextlib.suppress(OSError, EOFError), connection:
        while True:
            _receive(connection, request)
            duplex, up, down = _REQUEST.unpack(request)
            if len(held) < max(up, down):
                held = bytearray(max(up, down))
            if duplex:
                _return_blocks(connection, memoryview(held)[:up])
            else:
                _receive(connection, memoryview(held)[:up])
                connection.sendall(memoryview(held)[:down])


def _return_blocks(connection: socket.socket, room: memoryview) -> None:
    while room:
        count = connection.recv_into(room[:_BLOCK_BYTES])
        if not count:
            raise EOFError
        connection.sendall(room[:count])
        room = room[count:]


def _receive(connection: socket.socket, room: memoryview) -> None:
    while room:
        count = connection.recv_into(room)
        if not count:
            raise EOFError("the other side has closed the connection")
        room = room[count:]


def _quicken(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:  # a Unix socket has small buffers that do not grow
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


if __name__ == "__main__":
    serve(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1")
