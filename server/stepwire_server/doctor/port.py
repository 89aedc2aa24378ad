"""The check of the address for clients: a server must be able to listen on it."""

from __future__ import annotations

import errno
import os
import pathlib
import socket
from typing import Any

from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import checked_unix_path, unix_path
from stepwire_server.engines.probe import Finding
from stepwire_server.host.sockets import is_dead

__all__ = ["examine_port"]


def examine_port(bind: str) -> Finding:
    """Listen on the address of the server for a moment; a Unix socket is looked at only, because its file would stay.

    Args:
        bind: the setting `bind`, host:port or unix:/path.
    """
    if (path := unix_path(bind)) is not None:
        return _examine_socket(path)
    name, separator, port = bind.rpartition(":")
    # `Server` reads a port likewise: the name of a service is refused, and gRPC would apply modulo 65536.
    if not (separator and name and port.isascii() and port.isdigit() and int(port) < 65536):
        return Finding("port", False, f"{bind!r} is not host:port", "--bind 127.0.0.1:50051")
    try:
        addresses = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as problem:
        return Finding("port", False, f"{bind} is no address: {problem}", "--bind 127.0.0.1:50051")
    problems = [problem for problem in map(_listen, addresses) if problem is not None]
    taken = [problem for problem in problems if problem.errno == errno.EADDRINUSE]
    # A name such as localhost has several addresses; a machine without IPv6 can listen on one of them.
    if taken or len(problems) == len(addresses):
        return _cannot_listen(bind, port, (taken or problems)[0])
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


def _listen(address: tuple[Any, ...]) -> OSError | None:
    family, kind, protocol, _, socket_address = address
    try:
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            listener.bind(socket_address)
            listener.listen()
    except OSError as problem:
        return problem
    return None


def _cannot_listen(bind: str, port: str, problem: OSError) -> Finding:
    detail = f"{bind} cannot be listened on: {problem.strerror}"
    if problem.errno == errno.EADDRINUSE:
        remedy = f"find the process with: ss -ltnp 'sport = :{port}'; or choose another port with: --bind 127.0.0.1:0"
    elif problem.errno == errno.EACCES:
        remedy = "choose a port from 1024 up with: --bind 127.0.0.1:50051"
    else:
        remedy = "choose an address of this machine, shown by: ip -brief address; such as: --bind 127.0.0.1:50051"
    return Finding("port", False, detail, remedy)
