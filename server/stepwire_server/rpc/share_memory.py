"""The wiring of shared memory: from settings to a running handoff, or to the reason for none."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable

import structlog

from stepwire.errors import InvalidRequestError
from stepwire.v1 import transport_pb2
from stepwire.wire.addresses import boot_id
from stepwire.wire.error_details import status_details
from stepwire_server.config import ServerConfig
from stepwire_server.host.sockets import claim_socket
from stepwire_server.sharing.handoff import HandoffServer, HandoffStatistics
from stepwire_server.sharing.handoff_socket import HandoffSocket
from stepwire_server.sharing.loans import Loans
from stepwire_server.sharing.offer import Sharing

__all__ = ["HostSharing"]

_log = structlog.get_logger()


class HostSharing:
    """The memory that a server shares with processes of its host. Closes twice without complaint.

    Attributes:
        sharing: the offer of memory to clients that attach.
        path: the path of the socket over which clients fetch memory; empty if none is shared.
        off: the reason for sharing no memory of the host; empty if it is shared.
        device_off: the reason for sharing no memory of a device; empty if it is shared.
        packets_off: the reason for opening no packet lanes; empty if they are opened.
    """

    def __init__(
        self, config: ServerConfig, clock: Callable[[], float] = time.monotonic, devices: Iterable[str] = ("cpu",)
    ) -> None:
        """Listen if the settings say so. A socket that nobody asked for never keeps a server from starting.

        Args:
            config: the settings of the server.
            clock: the clock of deadlines, in seconds.
            devices: the names of the devices of the server.

        Raises:
            InvalidRequestError: the socket that the settings name is in use, or cannot be made.
        """
        self.path = ""
        self.off, self.device_off = _why_off(config), _why_device_off(config, devices)
        self.packets_off = "" if config.packets else "packet lanes are switched off on this server (--no-packets)"
        self._listener: HandoffSocket | None = None
        self._handoff: HandoffServer | None = None
        self._loans = Loans()
        if not (self.off and self.device_off and self.packets_off):
            self._listen(config, clock)
        off = {
            transport_pb2.TRANSPORT_SHM: self.off,
            transport_pb2.TRANSPORT_CUDA_IPC: self.device_off,
            transport_pb2.TRANSPORT_PACKETS: self.packets_off,
        }
        self.sharing = Sharing(self._handoff, off, self._loans)

    def statistics(self) -> HandoffStatistics:
        """Return the state of the handoff."""
        return HandoffStatistics(0, 0, 0, False) if self._handoff is None else self._handoff.statistics()

    def local_access(self, unix_socket: str) -> transport_pb2.LocalAccess:
        """Return the ways besides TCP for processes of this machine, with the server's Unix socket among them."""
        return transport_pb2.LocalAccess(
            unix_socket=unix_socket,
            handoff_socket=self.path,
            boot_id=boot_id(),
            shared_memory_off=self.off,
            device_memory_off=self.device_off,
            packets_off=self.packets_off,
        )

    def start(self) -> None:
        """Hand memory over from now on."""
        if self._handoff is not None:
            self._handoff.start()

    def close(self) -> None:
        """Remove the socket and end the handoff; clients get a moment to close memory of devices."""
        if self._listener is not None:
            self._listener.close()
        self._loans.close()
        if self._handoff is not None:
            self._handoff.close()

    def _listen(self, config: ServerConfig, clock: Callable[[], float]) -> None:
        others = [int(uid) for uid in config.handoff_uids.split(",") if uid]
        claim = functools.partial(claim_socket, field="handoff_socket")
        try:
            self._listener = listener = HandoffSocket(config.handoff_socket, claim, others)
        except (OSError, InvalidRequestError) as problem:
            if config.handoff_socket:
                raise _refusal(config.handoff_socket, problem) from None
            why = f"there is no socket to hand shared memory over: {problem}"
            self.off, self.device_off = self.off or why, self.device_off or why
            self.packets_off = self.packets_off or why
            _log.warning("no shared memory", problem=str(problem), remedy="name a socket with --handoff-socket PATH")
            return
        self.path = listener.path
        uids = {os.geteuid(), 0, *others}
        self._handoff = HandoffServer(listener.path, listener.socket, uids, status_details, clock=clock)


def _why_off(config: ServerConfig) -> str:
    if not config.shared_memory:
        return "shared memory is switched off on this server (--no-shared-memory)"
    return "" if hasattr(os, "memfd_create") else "shared memory needs Linux"


def _why_device_off(config: ServerConfig, devices: Iterable[str]) -> str:
    if not any(device.startswith("cuda") for device in devices):
        return "the server's sessions live on no GPU"
    return "" if config.cuda_ipc else "CUDA IPC is switched off on this server (--no-cuda-ipc)"


def _refusal(path: str, problem: Exception) -> InvalidRequestError:
    if isinstance(problem, InvalidRequestError):
        return problem
    return InvalidRequestError.of(
        "handoff_socket", f"cannot listen on {path!r}: {problem}; name another path with --handoff-socket"
    )
