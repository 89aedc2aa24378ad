"""An HTTP address of a server, for reading alone: few connections, each with a deadline, in threads of their own."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeAlias

import structlog

from stepwire.errors import InvalidRequestError
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.config import ServerConfig
from stepwire_server.monitoring.connections import Connections, RequestLines

__all__ = ["Address", "Endpoint", "Get", "Request", "Response", "checked_address"]

_log = structlog.get_logger()

_MOST_CONNECTIONS: Final = 32
_MOST_REQUEST_BYTES: Final = 32 << 10
"""The most bytes of a request: a line, and headers with a token."""

_REQUEST_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
"""The longest time until the end of the server is noticed."""


class Address(NamedTuple):
    """An address to listen on.

    Attributes:
        host: the host's name, or an address of it.
        port: the port; 0 for a free one.
        loopback: only this machine reaches it.
    """

    host: str
    port: int
    loopback: bool


class Request(NamedTuple):
    """A GET.

    Attributes:
        path: the path, without the query.
        query: the fields of the query, the last one of each name.
        headers: the headers, by their names in lower case.
        certificate: the client's certificate, PEM; None where none is asked for.
    """

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    certificate: bytes | None = None


class Response(NamedTuple):
    """The response to a request.

    Attributes:
        status: the HTTP status.
        body: the content.
        content_type: the type of the content.
        headers: further headers.
        stream: what follows the body, for as long as the client listens; None for nothing.
    """

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}
    stream: Iterator[bytes] | None = None


Get: TypeAlias = Callable[[Request], Response]
"""Responds to a GET."""

_ROLES: Final = {"metrics": "metrics", "status": "reader"}
"""For each setting of an address the least role of its callers."""


def checked_address(config: ServerConfig, field: str) -> Address:
    """Read the setting of an address, and refuse one that would tell strangers.

    Raises:
        InvalidRequestError: it is not host:port, or it is not loopback and there are no tokens, or no TLS.
    """
    text = str(getattr(config, field))
    host, separator, port = text.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidRequestError.of(field, f"{text!r} is not host:port")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or config.tokens):
        raise InvalidRequestError.of(
            field,
            f"{text!r} is not a loopback address and nothing would be asked of a caller; give --tokens with a token of "
            f"the role {_ROLES[field]}, or a loopback address",
        )
    if not (loopback or config.tls_cert or config.insecure):
        raise InvalidRequestError.of(
            field,
            f"{text!r} is not a loopback address and the token would travel in the clear; give --tls-cert and "
            "--tls-key, or accept it with --insecure or STEPWIRE_INSECURE=1",
        )
    return Address(host.strip("[]"), int(port), loopback)


class Endpoint:
    """Answers GET requests on an address. Closes twice without complaint.

    Attributes:
        port: the port that it listens on.
        url: the address as a browser has it, without a path.
    """

    def __init__(self, address: Address, field: str, get: Get, certificates: CertificateFiles | None = None) -> None:
        """Listen; nobody gets a response before `start`.

        Args:
            address: the address.
            field: the setting that names it.
            get: responds to a GET.
            certificates: the certificates to show; None for plaintext.

        Raises:
            InvalidRequestError: it cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        served = type("Server", (_Server,), {"address_family": family})
        handler = type("Handler", (_Handler,), {"get": staticmethod(get)})
        try:
            self._server: _Server = served((address.host, address.port), handler, certificates)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidRequestError.of(
                field, f"cannot listen on {address.host}:{address.port}: {reason}; choose another address"
            ) from None
        self.port: int = self._server.server_address[1]
        host = f"[{address.host}]" if family is socket.AF_INET6 else address.host
        self.url = f"{'http' if certificates is None else 'https'}://{host}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name=field, daemon=True
        )

    def start(self) -> None:
        """Response from now on."""
        self._thread.start()

    def close(self) -> None:
        """Listen no longer."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    """Serves each connection in a thread of its own, and drops those that are too many or too slow."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[http.server.BaseHTTPRequestHandler],
        certificates: CertificateFiles | None,
    ) -> None:
        self._certificates = certificates
        self.connections = Connections(_MOST_CONNECTIONS, _REQUEST_SECONDS)
        super().__init__(address, handler)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its handshake is made later, by its own thread."""
        connection, peer = super().get_request()
        connection.settimeout(_REQUEST_SECONDS)
        if self._certificates is None:
            return connection, peer
        context = self._certificates.present().context
        return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if not too many have one."""
        if self.connections.enter(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.leave(request)

    def service_actions(self) -> None:
        """End connections that are slow with their requests, several times a second."""
        self.connections.end_slow()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Drop a connection that has failed: its client has left, or is none."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """Responds to the requests of one connection; a subclass has the function."""

    get: Get
    server: _Server
    timeout = _REQUEST_SECONDS

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()
        self.rfile: Any = RequestLines(self.rfile, _MOST_REQUEST_BYTES)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def _respond(self, *, with_body: bool) -> None:
        self.server.connections.asked(self.request)
        try:
            response = type(self).get(self._request())
        except Exception:
            _log.exception("request failed", path=self.path)
            response = Response(HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error; the server's log explains it\n")
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        if response.stream is None:
            self.send_header("Content-Length", str(len(response.body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(response.body)
            for part in response.stream or ():
                self.wfile.write(part)

    def _request(self) -> Request:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(path, dict(urllib.parse.parse_qsl(query)), headers, self._certificate())

    def _certificate(self) -> bytes | None:
        shown = self.request.getpeercert(binary_form=True) if isinstance(self.request, ssl.SSLSocket) else None
        return None if shown is None else ssl.DER_cert_to_PEM_cert(shown).encode()

    def version_string(self) -> str:
        """Name no version of Python."""
        return "stepwire"

    def log_message(self, format: str, *args: Any) -> None:
        """Log no request: a scrape every few seconds would fill the log."""
