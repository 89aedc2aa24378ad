"""The addresses of a server: a TCP port, a Unix socket, or both."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import pathlib
import shutil
import tempfile
from typing import Final

import grpc
import structlog

from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import checked_unix_path, grpc_target, unix_path, unix_target
from stepwire_server.access.certificates import CertificateFiles
from stepwire_server.config import ServerConfig
from stepwire_server.host.sockets import check_unused, claim_socket, listen_problem

__all__ = ["Listening", "check_bind", "check_free"]

_log = structlog.get_logger()

_SOCKET_NAME: Final = "stepwire.sock"


class Listening:
    """The addresses of a server, held until `close`. Closes twice without complaint.

    Attributes:
        target: the address for clients: `host:port`, or `unix:/path` without a port.
        port: the TCP port; 0 without a port.
        unix_socket: the path of the Unix socket; empty without a socket.
    """

    def __init__(self, server: grpc.Server, config: ServerConfig, certificates: CertificateFiles | None = None) -> None:
        """Listen on the addresses that the settings name.

        Args:
            server: the server that gets the addresses.
            config: the settings.
            certificates: the certificates of the port; None for plaintext. A Unix socket never has any.

        Raises:
            InvalidRequestError: an address is in use, or cannot be listened on.
        """
        self._folders: list[pathlib.Path] = []
        self.port, self.unix_socket = 0, ""
        path = unix_path(config.bind)
        if path is None:
            self.port = _listen_tcp(server, config.bind, None if certificates is None else _credentials(certificates))
            self.target = f"{config.bind.rpartition(':')[0]}:{self.port}"
            self._listen_besides(server, config.socket_besides)
        else:
            self.unix_socket = _listen_unix(server, checked_unix_path(path, "bind"), "bind")
            self.target = unix_target(self.unix_socket)
        self._inode = os.stat(self.unix_socket).st_ino if self.unix_socket else 0

    def close(self) -> None:
        """Remove the socket from the disk, unless another server has put its own there since gRPC removed it."""
        with contextlib.suppress(OSError):
            if self._inode and os.stat(self.unix_socket).st_ino == self._inode:
                os.unlink(self.unix_socket)
        self._inode = 0
        while self._folders:
            shutil.rmtree(self._folders.pop(), ignore_errors=True)

    def _listen_besides(self, server: grpc.Server, choice: str) -> None:
        """Listen on a Unix socket too. A socket that nobody asked for never keeps a server from starting."""
        if choice == "off":
            return
        if choice != "auto":
            self.unix_socket = _listen_unix(server, checked_unix_path(choice, "unix_socket"), "unix_socket")
            return
        try:
            folder = pathlib.Path(tempfile.mkdtemp(prefix="stepwire-"))  # of mode 0700
            self._folders.append(folder)
            path = checked_unix_path(str(folder / _SOCKET_NAME), "unix_socket")
            self.unix_socket = _listen_unix(server, path, "unix_socket")
        except (OSError, InvalidRequestError) as problem:
            _log.warning("no unix socket", problem=str(problem), remedy="name one with --unix-socket PATH")


def check_bind(config: ServerConfig) -> None:
    """Refuse a malformed address, and plaintext beyond this machine.

    Raises:
        InvalidRequestError: the address is not understood, or not loopback without `insecure`.
    """
    if (path := unix_path(config.bind)) is not None:
        checked_unix_path(path, "bind")
        if config.unix_socket not in ("auto", "off"):
            raise InvalidRequestError.of(
                "unix_socket",
                f"{config.unix_socket!r} is a second socket beside bind {config.bind!r}; name one of them",
            )
        return
    host, separator, port = config.bind.rpartition(":")
    # gRPC takes a port modulo 65536.
    if not separator or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidRequestError.of("bind", f"{config.bind!r} is not host:port or unix:/path")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or config.insecure or config.tls_cert):
        raise InvalidRequestError.of(
            "bind",
            f"{config.bind!r} is not a loopback address and the connection is not encrypted: gradients and "
            "session ids would travel in the clear. Give --tls-cert and --tls-key, or accept it with --insecure or "
            "STEPWIRE_INSECURE=1",
        )


def check_free(config: ServerConfig) -> None:
    """Refuse an address that is in use, before anything is acquired that the other server may own.

    Raises:
        InvalidRequestError: another process listens there, or nobody can.
    """
    if (path := unix_path(config.bind)) is not None:
        check_unused(path, "bind")
        return
    _check_port(config.bind)
    if config.unix_socket not in ("auto", "off"):
        check_unused(checked_unix_path(config.unix_socket, "unix_socket"), "unix_socket")


def _listen_unix(server: grpc.Server, path: str, field: str) -> str:
    with claim_socket(path, field):
        try:
            server.add_insecure_port(grpc_target(unix_target(path)))
        except RuntimeError:
            raise InvalidRequestError.of(
                field, f"cannot listen on {path!r}: its folder cannot be written; name another path"
            ) from None
    return path


def _credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Return credentials for which each new connection gets the certificates of its moment."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        present = files.present()
        return grpc.ssl_server_certificate_configuration([(present.key, present.chain)], present.client_ca)

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=files.present().client_ca is not None
    )


def _check_port(bind: str) -> None:
    host, _, port_text = bind.rpartition(":")
    if (problem := listen_problem(host, int(port_text))) is not None:
        cause = "the port is taken" if problem.errno == errno.EADDRINUSE else problem.strerror
        raise InvalidRequestError.of(
            "bind",
            f"cannot listen on {bind!r}: {cause}; choose another with --bind host:port (port 0 takes a free one)",
        )


def _listen_tcp(server: grpc.Server, bind: str, credentials: grpc.ServerCredentials | None) -> int:
    _check_port(bind)
    try:
        port = server.add_insecure_port(bind) if credentials is None else server.add_secure_port(bind, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InvalidRequestError.of(
            "bind",
            f"cannot listen on {bind!r}; choose another with --bind host:port (port 0 takes a free one), or have gRPC "
            "say why on standard error by GRPC_VERBOSITY=ERROR",
        )
    return port
