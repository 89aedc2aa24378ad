"""The check of the address for clients: a server must be able to listen on it."""

from __future__ import annotations

import errno
import os
import pathlib
import socket
from collections.abc import Callable
from typing import Final

import stepwire
from stepwire.errors import (
    AuthenticationError,
    InvalidRequestError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StepwireError,
)
from stepwire.wire.addresses import checked_unix_path, unix_path
from stepwire_server.config import beside_target
from stepwire_server.engines.probe import Finding
from stepwire_server.host.sockets import is_dead, listen_problem

__all__ = ["examine_port"]

_ASK_SECONDS: Final = 2.0


def examine_port(bind: str, ask: Callable[[str], str] | None = None) -> Finding:
    """Listen on the address of the server for a moment; a Unix socket is looked at only, because its file would stay.

    Args:
        bind: the setting `bind`, host:port or unix:/path.
        ask: returns what a stepwire server at an address says of itself, empty for none; None asks over gRPC.
    """
    ask = ask or _served
    if (path := unix_path(bind)) is not None:
        return _examine_socket(path)
    name, separator, port = bind.rpartition(":")
    # `Server` reads a port likewise: the name of a service is refused, and gRPC would apply modulo 65536.
    if not (separator and name and port.isascii() and port.isdigit() and int(port) < 65536):
        return Finding("port", False, f"{bind!r} is not host:port", "--bind 127.0.0.1:50051")
    problem = listen_problem(name, int(port))
    if isinstance(problem, socket.gaierror):
        return Finding("port", False, f"{bind} is no address: {problem}", "--bind 127.0.0.1:50051")
    if problem is not None:
        return _taken(bind, ask) if problem.errno == errno.EADDRINUSE else _cannot_listen(bind, problem)
    return Finding("port", True, f"{bind} is free" if int(port) else f"{bind} takes a free one")


def _examine_socket(path: str) -> Finding:
    remedy = "--bind unix:/tmp/stepwire.sock"
    try:
        socket_path = pathlib.Path(checked_unix_path(path, "bind"))
    except InvalidRequestError as problem:
        return Finding("socket", False, str(problem), remedy)
    if socket_path.is_socket() and not is_dead(str(socket_path)):
        detail = f"{socket_path} is in use: another process listens on it"
        return Finding("socket", False, detail, f"stop that process, or: {remedy}")
    folder = next(parent for parent in socket_path.parents if parent.exists())
    if socket_path.exists() and not socket_path.is_socket():
        return Finding("socket", False, f"{socket_path} is there and is no socket", remedy)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return Finding("socket", False, f"{socket_path} cannot be made in {folder}", remedy)
    return Finding("socket", True, f"{socket_path} is free")


def _served(target: str) -> str:
    """Return what a stepwire server at an address says of itself; empty where none answers."""
    try:
        with stepwire.connect(target, timeout=_ASK_SECONDS) as client:
            return f"version {client.info().version}"
    except (AuthenticationError, PermissionDeniedError, ResourceExhaustedError) as refused:
        return "" if "handshake" in refused.metadata else f"which refuses this call: {refused}"
    except StepwireError:
        return ""


def _taken(bind: str, ask: Callable[[str], str]) -> Finding:
    target = beside_target(bind)
    if served := ask(target):
        return Finding(
            "port",
            False,
            f"a stepwire server is at {bind} already, {served}",
            f"stepwire doctor --target {target}; for one more server choose another port with: --bind 127.0.0.1:0",
            optional=True,
        )
    return Finding(
        "port",
        False,
        f"{bind} cannot be listened on: {os.strerror(errno.EADDRINUSE)}",
        f"find the process with: ss -ltnp 'sport = :{bind.rpartition(':')[2]}'; or choose another port with: --bind "
        "127.0.0.1:0",
    )


def _cannot_listen(bind: str, problem: OSError) -> Finding:
    if problem.errno == errno.EACCES:
        remedy = "choose a port from 1024 up with: --bind 127.0.0.1:50051"
    else:
        remedy = "choose an address of this machine, shown by: ip -brief address; such as: --bind 127.0.0.1:50051"
    return Finding("port", False, f"{bind} cannot be listened on: {problem.strerror}", remedy)
