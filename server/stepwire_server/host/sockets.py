"""Addresses of this machine: Unix sockets on the disk, one server at a path at a time, and ports. Knows no gRPC."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import stat
from collections.abc import Iterator
from typing import Any

from stepwire.errors import InvalidRequestError

__all__ = ["check_unused", "claim_socket", "is_dead", "listen_problem"]


@contextlib.contextmanager
def claim_socket(path: str, field: str) -> Iterator[None]:
    """Make room for a Unix socket that is bound in the block: for this user alone, in a folder that is made if need be.

    A socket that a killed server left behind is removed; a socket that somebody listens on is not. gRPC itself removes
    either. Servers that start at the same time look one after the other, because the folder is locked.

    The permissions come from the umask, which belongs to the whole process. The kernel accepts connections before
    anybody can change the mode of a bound socket, and no other way leaves no such moment.

    Args:
        path: the path of the socket.
        field: the setting that the error names.

    Raises:
        InvalidRequestError: the path is in use, or its folder cannot be written.
    """
    try:
        folder = pathlib.Path(path).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise _refusal(field, f"the folder of {path!r} cannot be used: {problem.strerror}; name another path") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_left_behind(path, field)
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)
    finally:
        os.close(lock)


def _remove_left_behind(path: str, field: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise _refusal(field, f"{path!r} is there and is no socket; name another path, or remove it")
        if is_dead(path):
            os.unlink(path)
            return
    except FileNotFoundError:
        return
    except OSError as problem:
        raise _refusal(field, f"{path!r} is there and cannot be replaced: {problem.strerror}; name another") from None
    raise _in_use(path, field)


def check_unused(path: str, field: str) -> None:
    """Refuse a path on which somebody listens.

    Args:
        path: the path of a socket, which may not be there.
        field: the setting that the error names.

    Raises:
        InvalidRequestError: the path is in use.
    """
    if pathlib.Path(path).is_socket():
        with contextlib.suppress(FileNotFoundError):  # its server has just ended
            if not is_dead(path):
                raise _in_use(path, field)


def is_dead(path: str) -> bool:
    """Tell whether nobody listens on a socket: anything but a refusal is a sign of life.

    Raises:
        FileNotFoundError: it is not there.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            raise
        except OSError:
            return False
    return False


def listen_problem(host: str, port: int) -> OSError | None:
    """Listen on an address for a moment, and return the reason if nobody can.

    gRPC tells no reason, and writes lines of its own to standard error. A name such as localhost has several addresses:
    a machine without IPv6 can listen on one of them, but none of them may be taken.

    Args:
        host: the name or the number, in brackets or not.
        port: the port; 0 for a free one.
    """
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as problem:
        return problem
    problems = [problem for problem in map(_listen, addresses) if problem is not None]
    taken = [problem for problem in problems if problem.errno == errno.EADDRINUSE]
    return (taken or problems)[0] if taken or len(problems) == len(addresses) else None


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


def _in_use(path: str, field: str) -> InvalidRequestError:
    return _refusal(field, f"cannot listen on {path!r}: another process does; name another path, or stop it")


def _refusal(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", metadata={"field": field})
