"""What `stepwire doctor` looks at on the way to the clients: whether the address can be listened on."""

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
    """Listen where the server would, for a moment; a Unix socket is only looked at, because it would stay."""
    if (path := unix_path(bind)) is not None:
        return _examine_socket(path)
    name, separator, port = bind.rpartition(":")
    # As `Server` reads it: no name of a service, and gRPC takes a port modulo 65536.
    if not (separator and name and port.isascii() and port.isdigit() and int(port) < 65536):
        return Finding("port", False, f"{bind!r} is not host:port", "--bind 127.0.0.1:50051")
    try:
        addresses = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as problem:
        return Finding("port", False, f"{bind} is no address: {problem}", "--bind 127.0.0.1:50051")
    problems = [problem for problem in map(_listen, addresses) if problem is not None]
    taken = [problem for problem in problems if problem.errno == errno.EADDRINUSE]
    # A name such as localhost has several addresses, of which a machine without IPv6 has one.
    if taken or len(problems) == len(addresses):
        return _cannot_listen(bind, port, (taken or problems)[0])
    return Finding("port", True, f"{bind} is free" if int(port) else f"{bind} takes a free one")


def _examine_socket(path: str) -> Finding:
    remedy = "--bind unix:/tmp/stepwire.sock"
    try:
        place = pathlib.Path(checked_unix_path(path, "bind"))
    except InvalidRequestError as problem:
        return Finding("socket", False, str(problem), remedy)
    if place.is_socket() and not is_dead(str(place)):
        return Finding("socket", False, f"{place} is in use: another process listens on it", f"stop it, or: {remedy}")
    folder = next(parent for parent in place.parents if parent.exists())
    if (place.exists() and not place.is_socket()) or not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return Finding("socket", False, f"{place} cannot be made in {folder}, or is something else", remedy)
    return Finding("socket", True, f"{place} is free")


def _listen(address: tuple[Any, ...]) -> OSError | None:
    family, kind, protocol, _, place = address
    try:
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            listener.bind(place)
            listener.listen()
    except OSError as problem:
        return problem
    return None


def _cannot_listen(bind: str, port: str, problem: OSError) -> Finding:
    detail = f"{bind} cannot be listened on: {problem.strerror}"
    if problem.errno == errno.EADDRINUSE:
        remedy = f"see who listens with: ss -ltnp 'sport = :{port}'; or take another port with: --bind 127.0.0.1:0"
    elif problem.errno == errno.EACCES:
        remedy = "take a port from 1024 up with: --bind 127.0.0.1:50051"
    else:
        remedy = "take an address of this machine, shown by: ip -brief address; such as: --bind 127.0.0.1:50051"
    return Finding("port", False, detail, remedy)
