"""The handoff in plain sockets, as another language would have it, and what a process holds."""

from __future__ import annotations

import fcntl
import mmap
import os
import pathlib
import socket
import stat
from types import TracebackType

import numpy as np
import numpy.typing as npt

from stepwire.v1 import transport_pb2

__all__ = ["Fetched", "Handed", "fetch", "held_by_process"]

_PATIENCE_SECONDS = 120.0


class Handed:
    """An answer of the handoff: the response, the descriptors, and the connection they came over. A context manager."""

    def __init__(self, connection: socket.socket, response: transport_pb2.HandoffResponse, fds: list[int]) -> None:
        self.connection = connection
        self.response = response
        self.descriptors = fds

    @property
    def refused(self) -> int:
        """The code of the refusal; 0 where there is none."""
        return self.response.refused.code

    def seals(self) -> list[int]:
        return [fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) for descriptor in self.descriptors]

    def close(self) -> None:
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> Handed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Fetched(Handed):
    """A stream's memory, mapped.

    Attributes:
        gradient: its bytes, to be written.
        parameters: their bytes.
    """

    def __init__(self, handed: Handed) -> None:
        super().__init__(handed.connection, handed.response, handed.descriptors)
        first, second = self.descriptors
        self.gradient: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(first, os.fstat(first).st_size), np.uint8)
        shown = mmap.mmap(second, os.fstat(second).st_size, prot=mmap.PROT_READ)
        self.parameters: npt.NDArray[np.uint8] = np.frombuffer(shown, np.uint8)


def fetch(path: str, request: transport_pb2.HandoffRequest | bytes) -> Handed:
    """Send one request and read the answer; one without a response where the server closed the connection."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)  # without a limit of time, which would make a full backlog an error
    connection.settimeout(_PATIENCE_SECONDS)
    connection.send(request if isinstance(request, bytes) else request.SerializeToString())
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
    return Handed(connection, transport_pb2.HandoffResponse.FromString(data), list(descriptors))


def held_by_process() -> tuple[int, int]:
    """Count the descriptors of this process, and its mappings of memory that is shared.

    Of sockets only those of packets count, and events do not: gRPC, and what it finds names with, opens and closes the
    others when it pleases, and no memory is shared over them. Servers of other tests read of this process in `/proc`.
    """
    mappings = pathlib.Path("/proc/self/maps").read_text().count("/memfd:stepwire-")
    return sum(not _is_of_others(int(descriptor)) for descriptor in os.listdir("/proc/self/fd")), mappings


def _is_of_others(descriptor: int) -> bool:
    try:
        link = os.readlink(f"/proc/self/fd/{descriptor}")
        if link.startswith("/proc/") or link in ("anon_inode:[eventpoll]", "anon_inode:[eventfd]"):
            return True
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
    except OSError:  # the listing's own, which is closed
        return True
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        return connection.type != socket.SOCK_SEQPACKET
