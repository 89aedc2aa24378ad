"""The ladder of transports: all of them, the one that was asked for, and the reasons against better ones.

From the best: device memory shared on one GPU (`cuda_ipc`), packets on one host beside memory shared on it (`packets`),
that memory without packets (`shm`), a Unix socket (`uds`), TCP. The first three are handed over by the server, and need
a connection for the rest: a Unix socket or TCP. Everything here is a look at this machine; `stepwire.transports.route`
tries the transports.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

from stepwire.connection.config_file import ConfigFile
from stepwire.errors import InvalidRequestError
from stepwire.transports.cuda.driver import cuda_in_use
from stepwire.v1 import transport_pb2
from stepwire.wire.addresses import boot_id, checked_unix_path

__all__ = ["MEMORIES", "TRANSPORTS", "VARIABLE", "asked_transport", "memory_problem", "socket_problem"]

TRANSPORTS: Final = ("cuda_ipc", "packets", "shm", "uds", "tcp")
"""All transports, the best first."""
MEMORIES: Final[Mapping[str, transport_pb2.Transport]] = {
    "cuda_ipc": transport_pb2.TRANSPORT_CUDA_IPC,
    "packets": transport_pb2.TRANSPORT_PACKETS,
    "shm": transport_pb2.TRANSPORT_SHM,
}
"""The transports that the server hands over, as `AttachOpen.transport` asks for them."""
VARIABLE: Final = "STEPWIRE_TRANSPORT"
_NO_FILE: Final = ConfigFile()
_ONE_USER: Final = "run both as one user; in a container: docker run --user {uid}:{gid}"
_NO_CUDA: Final = (
    "this process does nothing on a GPU; use one before it attaches, or ask for it by name: transport='cuda_ipc'"
)
_SHARED_FOLDER: Final = (
    "in a container share its folder, as with: docker run -v /run/stepwire:/run/stepwire, on both sides, and start the "
    "server with: --unix-socket /run/stepwire/stepwire.sock --handoff-socket /run/stepwire/handoff.sock"
)


def asked_transport(transport: str, environment: Mapping[str, str] = os.environ, file: ConfigFile = _NO_FILE) -> str:
    """Return the transport that is asked for: in the place of "auto", STEPWIRE_TRANSPORT or the config file's.

    Raises:
        InvalidRequestError: there is no such transport.
    """
    asked, field = transport, "transport"
    if transport == "auto" and environment.get(VARIABLE):
        asked, field = environment[VARIABLE], VARIABLE
    elif transport == "auto" and file.transport:
        asked, field = file.transport, "transport in the client config"
    if asked != "auto" and asked not in TRANSPORTS:
        raise InvalidRequestError(
            f"{field}: {asked!r} is no transport; use one of: auto, {', '.join(reversed(TRANSPORTS))}",
            metadata={"field": field},
        )
    return asked


def _machine_problem(local: transport_pb2.LocalAccess, own: str) -> str:
    """Return the reason that the server is not on this machine; empty if it is."""
    if not local.boot_id:
        return "the server does not tell which machine it runs on"
    if local.boot_id != own:
        return "the server runs on another machine, or under another kernel"
    return ""


def socket_problem(local: transport_pb2.LocalAccess, own_boot_id: str | None = None) -> str:
    """Return the reason against the server's Unix socket, and the remedy; empty without one.

    Args:
        local: the server's offers to clients on its machine.
        own_boot_id: the boot id of this machine; None to read it.
    """
    if problem := _machine_problem(local, boot_id() if own_boot_id is None else own_boot_id):
        return problem
    if not local.unix_socket:
        return "the server has no Unix socket; start it with: --unix-socket auto, or a path"
    try:
        path = checked_unix_path(local.unix_socket, "unix_socket")
    except InvalidRequestError as refused:
        return str(refused)
    return _path_problem(path, socket.SOCK_STREAM)


def memory_problem(
    name: str,
    local: transport_pb2.LocalAccess,
    own_boot_id: str | None = None,
    *,
    named: bool = False,
    uses_cuda: Callable[[], bool] = cuda_in_use,
) -> str:
    """Return the reason against a transport of `MEMORIES`, as far as it shows without a try; empty if it may work.

    A program without work on a GPU gets no CUDA context unless it asks: the context would cost more than shared memory
    saves.

    Args:
        name: one of `MEMORIES`.
        local: the server's offers to clients on its machine.
        own_boot_id: the boot id of this machine; None to read it.
        named: True if the user asked for the memory by its name.
        uses_cuda: a function that tells if this process computes on a GPU already.
    """
    if problem := _machine_problem(local, boot_id() if own_boot_id is None else own_boot_id):
        return problem
    off = {
        "cuda_ipc": local.device_memory_off,
        "packets": local.packets_off,
        "shm": local.shared_memory_off,
    }
    if off[name]:
        return off[name]
    if name == "cuda_ipc" and not named and not uses_cuda():
        return _NO_CUDA
    if not local.handoff_socket:
        return "the server hands no memory over; start it with: --handoff-socket PATH"
    try:
        path = checked_unix_path(local.handoff_socket, "handoff_socket")
    except InvalidRequestError as refused:
        return str(refused)
    return _path_problem(path, None)


def _path_problem(path: str, kind: int | None) -> str:
    """Return the reason against a socket; only a socket whose kind is given is connected to."""
    try:
        os.stat(path)
        if kind is None:
            allowed = os.access(path, os.R_OK | os.W_OK)
        else:
            with socket.socket(socket.AF_UNIX, kind) as probe:
                probe.setblocking(False)
                probe.connect(path)
            allowed = True
    except (FileNotFoundError, NotADirectoryError):
        return f"the server's socket {path} cannot be seen from here; {_SHARED_FOLDER}"
    except PermissionError:
        allowed = False
    except ConnectionRefusedError:
        return f"nobody listens on the server's socket {path} here; {_SHARED_FOLDER}"
    except BlockingIOError:  # there, and busy
        allowed = True
    except OSError as problem:
        return f"the server's socket {path} cannot be connected to: {problem.strerror}"
    return "" if allowed else f"the server's socket {path} is closed to uid {os.getuid()}; {_remedy(path)}"


def _remedy(path: str) -> str:
    """Return the remedy: the owner of the socket, or of its folder, may connect."""
    for place in (path, os.path.dirname(path)):
        try:
            owner = os.stat(place)
        except OSError:
            continue
        return _ONE_USER.format(uid=owner.st_uid, gid=owner.st_gid)
    return _ONE_USER.format(uid="UID", gid="GID") + ", those of the server"
