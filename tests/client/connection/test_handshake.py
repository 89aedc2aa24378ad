"""A server that resets every connection: the look at its handshake leaves no socket open."""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from stepwire.connection.handshake import refused_handshake
from stepwire.connection.security import TLS

_RESETS = 20


@contextlib.contextmanager
def resetting_port() -> Iterator[int]:
    """A port whose connections are reset at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    connection = listener.accept()[0]
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        thread = threading.Thread(target=reset, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("tls", [None, TLS()], ids=["plaintext", "tls"])
def test_reset_connections_tell_nothing_and_leave_no_socket_open(tls: TLS | None) -> None:
    with resetting_port() as port:
        assert [refused_handshake(f"127.0.0.1:{port}", tls) for _ in range(_RESETS)] == [None] * _RESETS
    gc.collect()  # an open socket that nobody holds is a warning, and a warning is an error here
