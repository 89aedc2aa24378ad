"""A handshake by hand, after gRPC's own has failed without a word.

With TLS 1.3 a client believes that it is connected before the server has looked at its certificate. A server of gRPC's
that does not like the certificate closes the connection and sends no alert. So gRPC tells a client of a closed socket,
and tries again until the deadline.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from typing import Final

from stepwire.connection.security import TLS

__all__ = ["refused_handshake"]

_SECONDS: Final = 0.5
_TRIES: Final = 2
"""The connections that a server closes before it is believed to refuse the certificate: one may close by chance."""

_ADDRESS: Final = re.compile(r"(?:dns:(?://[^/]*/)?|ipv4:|ipv6:)?(\[[^\]]+\]|[^:/\[\]]+):([0-9]{1,5})")
_NO_CERTIFICATE: Final = "the server asks for a client's certificate; give tls=stepwire.TLS(cert=…, key=…)"
_OWN_CERTIFICATE: Final = (
    "the server does not accept this client's certificate: it has expired, or no authority in the server's "
    "--tls-client-ca has signed it; connect with another one"
)
_SPEAKS_TLS: Final = "the server speaks TLS; connect with tls=True, or tls=stepwire.TLS(ca=…)"


def refused_handshake(target: str, tls: TLS | None) -> str | None:
    """Return the reason that a server refuses a connection for, with the remedy; None where it shows none.

    Args:
        target: the target as the user wrote it.
        tls: the files of TLS; None for plaintext.
    """
    found = _ADDRESS.fullmatch(target)
    if found is None:
        return None
    host, port = found[1].strip("[]"), int(found[2])
    if tls is None:
        return _SPEAKS_TLS if _first_byte(host, port, None) is not None else None
    if all(_first_byte(host, port, tls) == b"" for _ in range(_TRIES)):
        return _NO_CERTIFICATE if tls.cert is None else _OWN_CERTIFICATE
    return None


def _first_byte(host: str, port: int, tls: TLS | None) -> bytes | None:
    """Return the first byte of a server after a handshake, empty where it closes then; None without a handshake."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, *_, address in addresses:
        # Wrapped before it is connected: ssl leaves a socket open that it is given connected and finds reset.
        with contextlib.suppress(OSError, ValueError):  # among them the errors of TLS, names that no certificate has
            with (
                contextlib.closing(socket.socket(family)) as connection,
                contextlib.closing(_context(tls).wrap_socket(connection, server_hostname=host)) as secured,
            ):
                secured.settimeout(_SECONDS)
                secured.connect(address)
                return secured.recv(1) if tls is not None else b""
    return None


def _context(tls: TLS | None) -> ssl.SSLContext:
    """Return a context that believes every server: gRPC has told of a server that it does not believe."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if tls is not None and tls.cert is not None and tls.key is not None:
        context.load_cert_chain(tls.cert, tls.key, password=lambda: b"")  # never ask on the terminal
    return context
