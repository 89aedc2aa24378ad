"""Memory of a GPU that a server on it shares: opened by CUDA IPC, checked, mapped. Unverified on a GPU.

The server may free its memory only after the last mapping of it has ended: a process that touches unmapped memory loses
all its work on the GPU. So the mapping ends with the last array that shows it, as a mapping of shared memory does. With
the mapping ends the connection to the server, which tells the server, also of a process that dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.errors import UnavailableError, UnsupportedFeatureError
from stepwire.transports.cuda.driver import CudaDriver, CudaFailure, PrimaryContext
from stepwire.transports.handoff import handed_over
from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import FLOAT32, dtype_from_wire, wire_bytes

__all__ = ["DeviceMapping", "DeviceMemory", "device_failures", "fetch_device"]

_PATTERN_BYTES: Final = 64
_HANDLE_BYTES: Final = 64
_UUID_BYTES: Final = 16
_REMEDY: Final = (
    "the server must be another process on the same GPU; in containers use: docker run --ipc=host --pid=host, on both "
    "sides"
)


class DeviceMapping:
    """An allocation of the server's in this process, until nobody refers to it. Thread-safe.

    Attributes:
        address: the address of its start on the device.
        nbytes: the number of bytes in use.
    """

    def __init__(self, context: PrimaryContext, handle: bytes, nbytes: int, connection: socket.socket) -> None:
        """Map the allocation, and keep the connection until it is unmapped.

        Raises:
            CudaFailure: the allocation cannot be mapped; context and connection are left as they are.
        """
        self.address: int = context.open(handle)
        self.nbytes = nbytes
        self._context = context
        self._end = weakref.finalize(self, _unmap, context, self.address, connection)
        _mapped.add(self)

    def write(self, offset: int, values: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to byte `offset`.

        Raises:
            CudaFailure: the device failed.
        """
        self._context.write(self._place(offset, values.nbytes), values)

    def read(self, offset: int, out: npt.NDArray[Any]) -> None:
        """Copy from byte `offset` into a contiguous array.

        Raises:
            CudaFailure: the device failed.
        """
        self._context.read(self._place(offset, out.nbytes), out)

    def synchronize(self) -> None:
        """Wait until everything that this process asked of the device is done, whichever library asked.

        Raises:
            CudaFailure: the device failed.
        """
        self._context.synchronize()

    def forked(self) -> None:
        """Leave the memory to the parent, in a child: that has no CUDA, and must not keep the connection open."""
        if (detached := self._end.detach()) is not None:
            _, _, (_, _, connection), _ = detached
            connection.close()

    def _place(self, offset: int, nbytes: int) -> int:
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise IndexError(f"bytes [{offset}, {offset + nbytes}) are outside of the {self.nbytes} that are mapped")
        return self.address + offset


class DeviceMemory:
    """The memory of the gradient, and behind it that of the parameters. Closes twice without complaint.

    Views keep their content after the end.

    Attributes:
        mapping: the mapping of both; it ends with the last reference.
        gradient_dtype: the encoding of the gradient.
        reply_dtype: the encoding of the parameters.
        parameters_at: the byte at which the parameters begin.
    """

    def __init__(self, mapping: DeviceMapping, handoff: transport_pb2.Handoff) -> None:
        """Use memory that was mapped."""
        self.mapping: DeviceMapping | None = mapping
        self.gradient_dtype = dtype_from_wire(handoff.gradient_dtype, FLOAT32, "handoff.gradient_dtype", gradients=True)
        self.reply_dtype = dtype_from_wire(handoff.reply_dtype, FLOAT32, "handoff.reply_dtype")
        self.parameters_at: int = handoff.gradient_bytes

    def check(self, ask: Callable[[bytes], bytes]) -> bool:
        """Tell whether the server sees the same memory.

        Args:
            ask: a function that sends a pattern, and returns the bytes that the server sees where the parameters begin.

        Raises:
            UnsupportedFeatureError: the device failed.
        """
        mapping = self.required()
        pattern = os.urandom(_PATTERN_BYTES)
        try:
            mapping.write(0, np.frombuffer(pattern, np.uint8))
            mapping.synchronize()
            seen = ask(pattern)
            mapping.write(0, np.zeros(_PATTERN_BYTES, np.uint8))
            own = np.empty(len(seen), np.uint8)
            mapping.read(self.parameters_at, own)
        except CudaFailure as problem:
            raise _cannot_open(problem) from None
        return bool(seen) and seen == own.tobytes()

    def required(self) -> DeviceMapping:
        """Return the mapping of memory that is not closed."""
        assert self.mapping is not None
        return self.mapping

    def close(self) -> None:
        """Let go of the memory; it is unmapped with the last view."""
        self.mapping = None


_mapped: weakref.WeakSet[DeviceMapping] = weakref.WeakSet()


def _unmap(context: PrimaryContext, address: int, connection: socket.socket) -> None:
    """Unmap, and only then tell the server; a driver that has ended has unmapped everything."""
    try:
        with contextlib.suppress(CudaFailure):
            context.unmap(address)
        with contextlib.suppress(CudaFailure):
            context.close()
    finally:
        connection.close()


def _after_fork() -> None:
    for mapping in list(_mapped):
        mapping.forked()


os.register_at_fork(after_in_child=_after_fork)


def fetch_device(
    handoff: transport_pb2.Handoff, size: int, timeout_seconds: float, access_token: str = ""
) -> DeviceMemory:
    """Fetch and map the device memory of a stream.

    Args:
        handoff: the handoff of `AttachOpened`.
        size: elements of the flat space.
        timeout_seconds: the time for the conversation with the server; at most some seconds are used.
        access_token: the token that the stream was attached with; empty for none.

    Raises:
        UnsupportedFeatureError: CUDA cannot open the memory here; the message has the reason and the remedy.
        StepwireError: the server refused, cannot be reached, or sent something else than it says.
    """
    with handed_over(handoff, timeout_seconds, 0, access_token) as handed:
        _check(handoff, handed.response, size)
        try:
            context = CudaDriver().context_on(handed.response.cuda_device_uuid)
            with contextlib.ExitStack() as undo:
                undo.callback(context.close)
                nbytes = handoff.gradient_bytes + handoff.parameter_bytes
                mapping = DeviceMapping(context, handed.response.cuda_ipc_handle, nbytes, handed.connection)
                undo.pop_all()
        except CudaFailure as problem:
            raise _cannot_open(problem) from None
    return DeviceMemory(mapping, handoff)


def _check(handoff: transport_pb2.Handoff, response: transport_pb2.HandoffResponse, size: int) -> None:
    """Refuse memory that is too small for the tensors, or a handle that cannot be one.

    Raises:
        UnavailableError: the memory is too small, or the handle has another size.
    """
    sizes = (len(response.cuda_ipc_handle), len(response.cuda_device_uuid))
    if sizes != (_HANDLE_BYTES, _UUID_BYTES):
        raise UnavailableError(
            f"the server sent a handle of {sizes[0]} bytes and a UUID of {sizes[1]} instead of {_HANDLE_BYTES} and "
            f"{_UUID_BYTES}"
        )
    memories = {
        "gradient": (handoff.gradient_dtype, handoff.gradient_bytes),
        "parameters": (handoff.reply_dtype, handoff.parameter_bytes),
    }
    for what, (dtype, said) in memories.items():
        needed = max(wire_bytes(dtype_from_wire(dtype, FLOAT32, "handoff", gradients=True), size), _PATTERN_BYTES)
        if said < needed:
            raise UnavailableError(
                f"the device memory of the {what} has {said} bytes, as the server says, and it takes {needed}"
            )


def _cannot_open(problem: CudaFailure) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"CUDA cannot open the server's memory here: {problem}; {_REMEDY}", metadata={"feature": "transport_cuda_ipc"}
    )


@contextlib.contextmanager
def device_failures() -> Iterator[None]:
    """Translate failures of the device inside a step for its caller.

    Raises:
        UnavailableError: the device failed.
    """
    try:
        yield
    except CudaFailure as problem:
        raise UnavailableError(
            f"memory that is shared on the GPU failed: {problem}; look at the program's other work on the GPU, whose "
            "errors come up here too, or attach over another transport"
        ) from None
