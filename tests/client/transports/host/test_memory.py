"""Memory fetched from a server: looked at before it is trusted, mapped as it may be used, and left when it is not."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.errors import AuthenticationError, StepwireError, UnavailableError
from stepwire.transports.host.memory import SharedMemory, fetch, lies_in_parameters
from stepwire.v1 import transport_pb2
from stepwire.wire.error_details import status_details
from tests.support.raw_handoff import held_by_process

SIZE = 100
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
PAGE = mmap.PAGESIZE


def made(nbytes: int = PAGE, seals: int = SEALED) -> int:
    descriptor = os.memfd_create("stepwire-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class Server:
    """Answers one request with what a test says.

    Attributes:
        requests: what came.
        connections: the server's ends.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.requests: list[bytes] = []
        self.connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def answer(self, response: transport_pb2.HandoffResponse | bytes | None, *descriptors: int) -> None:
        """Answer the next request; None closes the connection."""

        def serve() -> None:
            connection = self._listener.accept()[0]
            self.connections.append(connection)
            self.requests.append(connection.recv(4096))
            if response is None:
                connection.close()
                return
            data = response if isinstance(response, bytes) else response.SerializeToString()
            socket.send_fds(connection, [data], list(descriptors))
            for descriptor in descriptors:
                os.close(descriptor)

        self._threads.append(threading.Thread(target=serve))
        self._threads[-1].start()

    def settle(self) -> None:
        """Wait until everything is answered, and let go of the connections."""
        for thread in self._threads:
            thread.join()
        for connection in self.connections:
            connection.close()

    def close(self) -> None:
        self.settle()
        self._listener.close()


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    with contextlib.closing(Server(str(tmp_path / "handoff.sock"))) as server:
        yield server


def handoff(server: Server, **fields: Any) -> transport_pb2.Handoff:
    defaults: dict[str, Any] = {
        "socket": server.path,
        "token": b"t" * 16,
        "gradient_dtype": 1,
        "gradient_bytes": PAGE,
        "reply_dtype": 2,
        "parameter_bytes": PAGE,
    }
    return transport_pb2.Handoff(**defaults | fields)


@pytest.fixture
def memory(server: Server) -> Iterator[SharedMemory]:
    server.answer(b"", made(), made())
    with contextlib.closing(fetch(handoff(server), SIZE, 120.0)) as memory:
        yield memory


def test_memory_is_mapped_as_it_may_be_used(server: Server, memory: SharedMemory) -> None:
    assert server.requests == [transport_pb2.HandoffRequest(token=b"t" * 16).SerializeToString()]
    assert (memory.gradient.shape, memory.gradient.dtype, memory.gradient.flags.writeable) == ((SIZE,), "float32", True)
    parameters = memory.parameters
    assert (parameters.shape, parameters.dtype.name, parameters.flags.writeable) == ((SIZE,), "bfloat16", False)
    memory.gradient[:] = 1.0
    assert not parameters.view(np.uint16).any()


def test_closing_tells_the_server_and_leaves_arrays(server: Server) -> None:
    before = held_by_process()
    server.answer(b"", made(), made())
    memory = fetch(handoff(server), SIZE, 120.0)
    gradient = memory.gradient
    memory.close()
    memory.close()
    assert server.connections[0].recv(1) == b""
    del memory
    gradient[:] = 2.0
    assert gradient.sum() == 2.0 * SIZE
    del gradient
    server.settle()
    assert held_by_process() == before


@pytest.mark.parametrize(
    ("fields", "sizes", "seals", "problem"),
    [
        ({}, (2 * PAGE, PAGE), SEALED, "the gradient has 8192 bytes; the server says 4096"),
        ({"parameter_bytes": 2 * PAGE}, (PAGE, PAGE), SEALED, "the parameters has 4096 bytes; the server says 8192"),
        ({}, (PAGE, PAGE), fcntl.F_SEAL_GROW, "of the gradient is not sealed"),
        ({"gradient_bytes": 64}, (64, PAGE), SEALED, "it takes 400"),
        ({"gradient_bytes": 0}, (0, PAGE), SEALED, "it takes 400"),
        ({"gradient_dtype": 77}, (PAGE, PAGE), SEALED, "encoding 77 is not served"),
        ({"reply_dtype": 4}, (PAGE, PAGE), SEALED, "encoding 4 is not served here"),
    ],
)
def test_memory_that_is_not_as_it_was_said_is_not_mapped(
    server: Server, fields: dict[str, Any], sizes: tuple[int, int], seals: int, problem: str
) -> None:
    before = held_by_process()
    server.answer(b"", made(sizes[0], seals), made(sizes[1], seals))
    with pytest.raises(StepwireError, match=problem) as refused:
        fetch(handoff(server, **fields), SIZE, 120.0)
    del refused
    server.settle()
    assert held_by_process() == before


def files(tmp_path: pathlib.Path) -> int:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    return os.open(path, os.O_RDWR)


def test_a_file_is_no_memory(server: Server, tmp_path: pathlib.Path) -> None:
    server.answer(b"", files(tmp_path), made())
    with pytest.raises(UnavailableError):
        fetch(handoff(server), SIZE, 120.0)


@pytest.mark.parametrize(
    ("response", "descriptors", "problem"),
    [
        (None, 0, "without a response"),
        (b"", 1, "1 descriptors came"),
        (b"\xff\xff", 2, "are no response"),
    ],
)
def test_an_answer_that_is_none_leaves_nothing(
    server: Server, response: bytes | None, descriptors: int, problem: str
) -> None:
    before = held_by_process()
    server.answer(response, *(made() for _ in range(descriptors)))
    with pytest.raises(UnavailableError, match=problem):
        fetch(handoff(server), SIZE, 120.0)
    server.settle()
    assert held_by_process() == before


def test_a_refusal_is_the_servers_own_error(server: Server) -> None:
    error = AuthenticationError("the token is of yesterday", metadata={"token": 7})
    server.answer(transport_pb2.HandoffResponse(refused=status_details(error)))
    with pytest.raises(AuthenticationError, match="the token is of yesterday") as refused:
        fetch(handoff(server), SIZE, 120.0)
    assert refused.value.metadata == {"token": "7"}


def test_a_socket_that_is_not_there_is_named(tmp_path: pathlib.Path, server: Server) -> None:
    path = str(tmp_path / "gone.sock")
    with pytest.raises(UnavailableError, match="cannot be fetched from .*gone.sock: .*No such file"):
        fetch(handoff(server, socket=path), SIZE, 120.0)


def test_a_server_that_is_silent_is_not_waited_for(server: Server) -> None:
    """It listens, and accepts nobody."""
    with pytest.raises(UnavailableError, match="cannot be fetched"):
        fetch(handoff(server), SIZE, 0.01)


def test_a_pattern_proves_that_the_server_sees_the_same(memory: SharedMemory) -> None:
    patterns: list[bytes] = []

    def see(pattern: bytes) -> bytes:
        patterns.append(pattern)
        assert memory.gradient.tobytes().startswith(pattern)
        return bytes(len(pattern))  # the parameters are zeros

    assert memory.check(see) and memory.check(see)
    assert (len(patterns[0]), patterns[0] != patterns[1]) == (64, True)
    assert not memory.gradient.any()
    for seen in (b"", b"other parameters"):
        assert not memory.check(lambda _, seen=seen: seen)


def test_arrays_that_show_parameters_are_known(memory: SharedMemory) -> None:
    view = memory.parameters[3:40].reshape(37, 1)[::2]
    assert [lies_in_parameters(array) for array in (memory.parameters, view)] == [True, True]
    own = np.zeros(4, np.float32)
    others = (memory.gradient, memory.gradient[1:], own, own[1:], view.astype(np.float32))
    assert [lies_in_parameters(array) for array in others] == [False] * 5


# A fork of this process, with its threads, could hang for reasons that are not ours.
FORKING = """
import os, socket, sys
import numpy as np
from stepwire.host.memory_map import MemoryMap
from stepwire.transports.host.memory import SharedMemory
from stepwire.v1 import transport_pb2

ours, theirs = socket.socketpair()
handoff = transport_pb2.Handoff(gradient_dtype=1, reply_dtype=1)
descriptor = os.memfd_create("gradient")
os.ftruncate(descriptor, 4096)
mappings = MemoryMap(descriptor, 4096), MemoryMap(descriptor, 4096, private=True)
memory = SharedMemory(ours, handoff, *mappings, 100, descriptor)
memory.gradient[:] = 3.0
child = os.fork()
if not child:
    if sys.argv[1] == "writes":
        memory.gradient[0] = 7.0
    os._exit(int(memory.gradient.sum()) % 251)
_, status = os.waitpid(child, 0)
memory.gradient[0] += 1.0
memory.close()
print(os.waitstatus_to_exitcode(status), memory.gradient.sum(), theirs.recv(1), len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize(("does", "ended"), [("writes", 304 % 251), ("reads", 300 % 251)], ids=["writes", "reads"])
def test_a_forked_child_reads_its_parents_gradient_and_its_writes_are_its_own(does: str, ended: int) -> None:
    """And it does not keep the connection open. The parent closes all descriptors but those of the script."""
    command = [sys.executable, "-c", FORKING, does]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[:3] == [str(ended), "301.0", "b''"]
    assert int(said[3]) == len(["in", "out", "err", "theirs", "memfd", "listdir"])
