"""A handoff on a socket of the test's own, and the offered parcel."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest

from stepwire.v1 import transport_pb2
from stepwire.wire.error_details import status_details
from stepwire_server.sharing.handoff import HandoffServer, peer_uid

PATIENCE_SECONDS = 120.0


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Have no garbage collected: what a stream held goes with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Parcel:
    """An offer of some descriptors.

    Attributes:
        ended: set when the process that fetched it is gone.
    """

    def __init__(self, *descriptors: int, handle: bytes = b"") -> None:
        self.ended = threading.Event()
        self._descriptors = descriptors
        self._handle = handle

    def descriptors(self) -> Sequence[int]:
        return self._descriptors

    def response(self) -> transport_pb2.HandoffResponse:
        return transport_pb2.HandoffResponse(cuda_ipc_handle=self._handle)

    def released(self) -> None:
        assert not self.ended.is_set()
        self.ended.set()

    def wait_ended(self) -> None:
        assert self.ended.wait(PATIENCE_SECONDS), "nobody said that it was released"


@pytest.fixture
def parcel() -> type[Parcel]:
    return Parcel


@pytest.fixture
def pipes() -> Iterator[tuple[int, int]]:
    """An offer of two descriptors."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def hand_over(tmp_path: pathlib.Path, clock: Any) -> Iterator[Callable[..., HandoffServer]]:
    """Start handoffs on the test's clock."""
    with contextlib.ExitStack() as stack:

        def start(
            *, uids: Collection[int] = (os.geteuid(),), uid_of: Callable[[socket.socket], int] = peer_uid
        ) -> HandoffServer:
            path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.sock")
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(path)
            listener.listen(128)
            return stack.enter_context(HandoffServer(path, listener, uids, status_details, clock=clock, uid_of=uid_of))

        yield start
