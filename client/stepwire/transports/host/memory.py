"""Memory that a server on this host shares: fetched over its Unix socket, checked, mapped.

The server made the memory and sealed its size, so that neither side can remove pages in the middle of a step. A client
without a look at the seals would trust the server with more than its gradients. The connection of the handoff stays
open for as long as the memory is used: its end tells the server.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import stat
import weakref
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.errors import UnavailableError
from stepwire.host.memory_map import MemoryMap, map_over
from stepwire.transports.handoff import Handed, handed_over
from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import FLOAT32, dtype_from_wire, wire_bytes, wire_items

__all__ = ["DESCRIPTORS", "SharedMemory", "fetch", "lies_in_parameters"]

DESCRIPTORS: Final = 2
"""The descriptors of the memory: the gradient's, and the parameters'."""

_FIXED_SIZE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PATTERN_BYTES: Final = 64

_parameter_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_open: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


class SharedMemory:
    """The memory of the gradient and of the parameters. Closes twice without complaint; arrays keep their content.

    Attributes:
        gradient: items of the session's gradient dtype, to be written.
        parameters: the parameters, `(size,)` of the session's reply dtype, read-only.
        private: the same, writable. Writes are this process's own, and hide the server's values until `forget_writes`.
            The kernel copies a page at its first write; nobody else sees the copy.
    """

    def __init__(
        self,
        connection: socket.socket,
        handoff: transport_pb2.Handoff,
        gradient: MemoryMap,
        parameters: MemoryMap,
        size: int,
        descriptor: int,
    ) -> None:
        """Use memory that was fetched, and keep its connection, and a copy of the gradient's descriptor."""
        gradient_dtype = dtype_from_wire(handoff.gradient_dtype, FLOAT32, "handoff.gradient_dtype", gradients=True)
        reply_dtype = dtype_from_wire(handoff.reply_dtype, FLOAT32, "handoff.reply_dtype")
        self.gradient: npt.NDArray[Any] = gradient.array(gradient_dtype, wire_items(gradient_dtype, size))
        self.private: npt.NDArray[Any] = parameters.array(reply_dtype, size)
        self.parameters: npt.NDArray[Any] = self.private.view()
        self.parameters.flags.writeable = False
        self._mapping = parameters
        # Also when nobody closes it: a client was closed with its sessions attached, or everything was dropped.
        self._descriptor = os.dup(descriptor)
        self._let_go = weakref.finalize(self, _let_go, connection, self._descriptor)
        self._bytes = gradient.array(np.uint8, gradient.nbytes)
        self._parameter_bytes = parameters.array(np.uint8, parameters.nbytes)
        _parameter_maps.add(parameters.owner)
        _open.add(self)

    @classmethod
    def mapped(cls, handed: Handed, handoff: transport_pb2.Handoff, size: int) -> SharedMemory:
        """Check and map memory that was handed over; its descriptors are the first of all that came.

        Raises:
            UnavailableError: it is other memory than the server says.
            OSError: it cannot be mapped.
        """
        gradient, parameters = _mapped(handed.descriptors[:DESCRIPTORS], handoff, size)
        return cls(handed.connection, handoff, gradient, parameters, size, handed.descriptors[0])

    def check(self, ask: Callable[[bytes], bytes]) -> bool:
        """Tell whether the server sees the same memory.

        Args:
            ask: a function that sends a pattern, and returns the bytes that the server sees where the parameters begin.
        """
        pattern = os.urandom(_PATTERN_BYTES)
        start = self._bytes[:_PATTERN_BYTES]
        start[:] = np.frombuffer(pattern, np.uint8)
        try:
            seen = ask(pattern)
        finally:
            start[:] = 0
        return bool(seen) and seen == self._parameter_bytes[: len(seen)].tobytes()

    def forget_writes(self) -> None:
        """Show the server's parameters everywhere again, also in pages of `private` that were written."""
        self._mapping.forget_writes()

    def close(self) -> None:
        """Tell the server that the memory is not used any more; it goes with the last array that shows it."""
        self._let_go()

    def forked(self) -> None:
        """Leave the memory to the parent, in a child.

        A child that writes a gradient would write the parent's. So a private mapping of the same memory, whose writes
        are the child's own, gets its place. It may not be unmapped: inherited arrays would show the next use of its
        addresses. And the connection would outlive the parent in the child.
        """
        if not self._let_go.alive:
            return
        address, nbytes = self._bytes.ctypes.data, self._bytes.nbytes
        try:
            map_over(address, nbytes, self._descriptor, private=True)
        except OSError:  # no memory for it: a write is a segmentation fault
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.PROT_READ)
        self.close()


def _let_go(connection: socket.socket, descriptor: int) -> None:
    connection.close()
    os.close(descriptor)


def _after_fork() -> None:
    for memory in list(_open):
        memory.forked()


os.register_at_fork(after_in_child=_after_fork)


def lies_in_parameters(array: npt.NDArray[Any]) -> bool:
    """Tell whether an array shows parameters that a server shares, or shared before a connection broke."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return isinstance(owner, mmap.mmap) and owner in _parameter_maps


def fetch(handoff: transport_pb2.Handoff, size: int, timeout_seconds: float, access_token: str = "") -> SharedMemory:
    """Fetch, check and map the memory of a stream.

    Args:
        handoff: the handoff of `AttachOpened`.
        size: elements of the flat space.
        timeout_seconds: the time for everything; at most some seconds are used.
        access_token: the token that the stream was attached with; empty for none.

    Raises:
        StepwireError: the server refused, cannot be reached, or sent something else than it says.
    """
    with handed_over(handoff, timeout_seconds, DESCRIPTORS, access_token) as handed:
        return SharedMemory.mapped(handed, handoff, size)


def _mapped(descriptors: list[int], handoff: transport_pb2.Handoff, size: int) -> tuple[MemoryMap, MemoryMap]:
    gradient, parameters = descriptors
    _check(gradient, handoff.gradient_bytes, _needed(handoff.gradient_dtype, size), "gradient")
    _check(parameters, handoff.parameter_bytes, _needed(handoff.reply_dtype, size), "parameters")
    # The parameters private, because frameworks write theirs now and then: a shared mapping could only be read, and
    # writing would end the process. Pages without writes are the server's own all the same.
    mappings = (
        MemoryMap(gradient, handoff.gradient_bytes),
        MemoryMap(parameters, handoff.parameter_bytes, private=True),
    )
    for mapping in mappings:
        mapping.populate()
    return mappings


def _needed(dtype: int, size: int) -> int:
    return max(wire_bytes(dtype_from_wire(dtype, FLOAT32, "handoff", gradients=True), size), _PATTERN_BYTES)


def _check(descriptor: int, said: int, needed: int, what: str) -> None:
    """Refuse memory of another size than the server said, or of a size that could shrink.

    Raises:
        UnavailableError: the memory is of another size, or not sealed.
        OSError: the descriptor is of no memory.
    """
    status, seals = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if not stat.S_ISREG(status.st_mode) or status.st_size != said or said < needed:
        raise UnavailableError(
            f"the shared memory of the {what} has {status.st_size} bytes; the server says {said}, and it takes {needed}"
        )
    if seals & _FIXED_SIZE != _FIXED_SIZE:
        raise UnavailableError(f"the size of the shared memory of the {what} is not sealed (seals {seals:#x})")
