"""Memory of a GPU fetched from a server: looked at before it is opened, and closed when nobody shows it any more."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.errors import UnavailableError, UnsupportedFeatureError
from stepwire.transports.cuda import driver as cuda_driver
from stepwire.transports.cuda import memory as device_memory
from stepwire.transports.cuda.driver import CudaDriver, CudaFailure, cuda_in_use
from stepwire.transports.cuda.memory import DeviceMemory, fetch_device
from stepwire.transports.cuda.stand_ins import StandIn, stood_in
from stepwire.transports.cuda.views import DeviceView, shows_parameters
from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT16, FLOAT32
from tests.support.fake_cupy import FakeCupy
from tests.support.fake_libcuda import FakeLibcuda

SIZE = 100
PAGE = 4096
PATIENCE_SECONDS = 120.0


class Server:
    """One allocation of a pretended GPU, and a socket that hands its handle over.

    Attributes:
        path: of the socket.
        cupy: the GPU.
        libcuda: the client's driver.
        fields: of the response.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = str(folder / "handoff.sock")
        self.cupy = FakeCupy(folder, devices=2)
        self.libcuda = FakeLibcuda(self.cupy._driver)
        with self.cupy.cuda.Device(1):
            self.memory = self.cupy.cuda.Memory(2 * PAGE)
            handle = self.cupy.cuda.runtime.ipcGetMemHandle(self.memory.ptr)
        self.fields = {"cuda_ipc_handle": handle, "cuda_device_uuid": self.libcuda.uuids[1]}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self.connection: socket.socket | None = None
        self.bytes[:] = 0

    @property
    def bytes(self) -> np.ndarray:
        """The allocation."""
        held: np.ndarray = self.memory._range.bytes_at(self.memory.ptr, 2 * PAGE)
        return held

    def fetch(self, **fields: Any) -> DeviceMemory:
        defaults = {"gradient_dtype": 1, "gradient_bytes": PAGE, "reply_dtype": 2, "parameter_bytes": PAGE}
        handoff = transport_pb2.Handoff(socket=self.path, token=b"t" * 16, **defaults | fields)
        thread = threading.Thread(target=self._answer)
        thread.start()
        try:
            return fetch_device(handoff, SIZE, PATIENCE_SECONDS)
        finally:
            thread.join()

    def client_has_ended(self) -> bool:
        """Tell whether the connection is closed at the other end."""
        assert self.connection is not None
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
        self.cupy.check()

    def _answer(self) -> None:
        self.connection = self._listener.accept()[0]
        self.connection.recv(4096)
        self.connection.send(transport_pb2.HandoffResponse(**self.fields).SerializeToString())


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with contextlib.closing(Server(tmp_path)) as server:
        monkeypatch.setattr(cuda_driver, "load_library", lambda *, only_if_loaded=False: server.libcuda)
        yield server


def left(server: Server) -> tuple[int, list[int], bool]:
    """What the client holds, and whether the server has heard of its end."""
    return len(server.libcuda.mapped), server.libcuda.contexts, server.client_has_ended()


def test_memory_is_opened_on_its_gpu_and_closed(server: Server) -> None:
    memory = server.fetch()
    assert (memory.gradient_dtype, memory.reply_dtype, memory.parameters_at) == (FLOAT32, BFLOAT16, PAGE)
    assert (memory.required().address, memory.required().nbytes) == (server.memory.ptr, 2 * PAGE)
    assert left(server) == (1, [0, 1], False)
    memory.close()
    memory.close()
    assert left(server) == (0, [0, 0], True)


def test_the_memory_ends_with_the_last_view(server: Server) -> None:
    memory = server.fetch()
    view = DeviceView(memory.required(), PAGE, (3, 4), BFLOAT16, of_parameters=True)
    other = DeviceView(view.mapping, 8, (5,), FLOAT32)
    memory.close()
    server.bytes[8:28] = np.arange(5, dtype=np.float32).view(np.uint8)
    assert np.asarray(other).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    del other
    assert left(server) == (1, [0, 1], False)
    del view
    assert left(server) == (0, [0, 0], True)


def test_views_are_what_other_libraries_take(server: Server) -> None:
    mapping = server.fetch().required()
    shapes = {"<f4": FLOAT32, "<f2": FLOAT16, "<u2": BFLOAT16}
    for typestr, dtype in shapes.items():
        assert DeviceView(mapping, PAGE, (3, 4), dtype).__cuda_array_interface__ == {
            "version": 3,
            "shape": (3, 4),
            "typestr": typestr,
            "data": (server.memory.ptr + PAGE, False),
            "strides": None,
            "stream": None,
        }
    assert DeviceView(mapping, 0, (0, 4), FLOAT32).__cuda_array_interface__["data"] == (0, False)
    assert DeviceView(mapping, 0, (), FLOAT32).size == 1


def test_numpy_gets_a_copy(server: Server) -> None:
    mapping = server.fetch().required()
    view = DeviceView(mapping, 0, (2,), FLOAT32)
    server.bytes[:8] = np.array([1.5, 2.5], np.float32).view(np.uint8)
    waits = server.libcuda.synchronized
    assert np.asarray(view, np.float64).tolist() == [1.5, 2.5]
    assert server.libcuda.synchronized == waits + 1
    with pytest.raises(ValueError, match="always a copy"):
        np.array(view, copy=False)
    server.libcuda.statuses["cuMemcpyDtoH_v2"] = 700
    with pytest.raises(UnavailableError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        np.asarray(view)


def test_stand_ins_take_their_values_once(server: Server) -> None:
    mapping = server.fetch().required()
    view = DeviceView(mapping, 0, (2,), FLOAT32)
    arrays, found = stood_in({"a": view, "b": np.ones(1, np.float32)})
    assert isinstance(arrays, dict) and set(found) == {"a"} and arrays["a"] is found["a"].array
    server.bytes[:8] = np.array([1.5, 2.5], np.float32).view(np.uint8)
    found["a"].fill()
    server.bytes[:8] = 0
    found["a"].fill()
    assert found["a"].array.tolist() == [1.5, 2.5]
    listed, found = stood_in([np.ones(1, np.float32), view])
    assert isinstance(listed, list) and isinstance(found["1"], StandIn) and listed[1] is found["1"].array
    plain = {"b": np.ones(1, np.float32)}
    assert stood_in(plain) == (plain, {}) and stood_in(plain)[0] is plain
    shown = DeviceView(mapping, 0, (2,), FLOAT32, of_parameters=True)
    assert [shows_parameters(each) for each in (view, shown, np.ones(1))] == [False, True, False]
    assert [view.is_same(DeviceView(mapping, offset, (2,), FLOAT32)) for offset in (0, 4)] == [True, False]


def test_copies_stay_within_what_is_mapped(server: Server) -> None:
    mapping = server.fetch().required()
    for offset, count in [(-1, 1), (2 * PAGE, 1), (2 * PAGE - 3, 4)]:
        with pytest.raises(IndexError, match="are outside of the 8192 that are mapped"):
            mapping.write(offset, np.zeros(count, np.uint8))


def test_both_sides_look_at_a_pattern(server: Server) -> None:
    memory = server.fetch()
    server.bytes[PAGE : PAGE + 64] = 7

    def ask(pattern: bytes) -> bytes:
        assert server.bytes[:64].tobytes() == pattern
        return server.bytes[PAGE : PAGE + 64].tobytes()

    assert memory.check(ask)
    assert not server.bytes[:64].any()
    assert not memory.check(lambda pattern: b"x" * 64)
    assert not memory.check(lambda pattern: b"")
    server.libcuda.statuses["cuCtxSynchronize"] = 700
    with pytest.raises(UnsupportedFeatureError, match=r"ILLEGAL_ADDRESS \(700\)"):
        memory.check(ask)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cuda_ipc_handle": b"h" * 63}, "a handle of 63 bytes and a UUID of 16"),
        ({"cuda_device_uuid": b""}, "a handle of 64 bytes and a UUID of 0"),
    ],
)
def test_an_answer_that_opens_nothing_is_refused(server: Server, fields: dict[str, Any], text: str) -> None:
    server.fields |= fields
    with pytest.raises(UnavailableError, match=text):
        server.fetch()
    assert left(server) == (0, [0, 0], True)


@pytest.mark.parametrize("part", ["gradient", "parameter"])
def test_memory_that_is_too_small_is_refused(server: Server, part: str) -> None:
    with pytest.raises(UnavailableError, match=rf"the device memory of the {part}s? has 32 bytes"):
        server.fetch(**{f"{part}_bytes": 32})
    assert left(server) == (0, [0, 0], True)


@pytest.mark.parametrize(
    "function", ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuIpcOpenMemHandle_v2"]
)
def test_what_fails_is_named_and_leaves_nothing(server: Server, function: str) -> None:
    server.libcuda.statuses[function] = 801
    with pytest.raises(UnsupportedFeatureError, match=rf"{function} fails with CUDA_ERROR_NOT_SUPPORTED \(801\)"):
        server.fetch()
    server.libcuda.statuses.clear()
    assert left(server) == (0, [0, 0], True)


def test_another_gpu(server: Server) -> None:
    server.fields["cuda_device_uuid"] = bytes(range(16))
    with pytest.raises(UnsupportedFeatureError, match="GPU-00010203-0405-0607-0809-0a0b0c0d0e0f among its 2"):
        server.fetch()


def test_a_part_of_a_gpu_is_known_by_its_own_uuid_and_by_the_gpus(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = b"MIG" + bytes(13)

    def of_a_part(self: FakeLibcuda, uuid: Any, device: Any) -> None:
        np.ctypeslib.ctypes.memmove(uuid._obj, own, 16)

    monkeypatch.setattr(FakeLibcuda, "_cuDeviceGetUuid_v2", of_a_part)
    assert CudaDriver().uuids(1) == (own, server.libcuda.uuids[1])
    monkeypatch.delattr(FakeLibcuda, "_cuDeviceGetUuid_v2")
    assert CudaDriver().uuids(1) == (server.libcuda.uuids[1],)
    monkeypatch.delattr(FakeLibcuda, "_cuDeviceGetUuid")
    with pytest.raises(CudaFailure, match="this driver is too old: it has no cuDeviceGetUuid"):
        CudaDriver().uuids(1)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*, only_if_loaded: bool = False) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_driver, "load_library", missing)
    with pytest.raises(CudaFailure, match="there is no NVIDIA driver here: libcuda"):
        CudaDriver()
    assert not cuda_in_use()


def test_a_program_is_not_made_to_use_cuda(server: Server) -> None:
    assert not cuda_in_use() and not server.libcuda.initialized
    server.libcuda.initialized = True
    assert not cuda_in_use()
    server.libcuda.contexts[1] = 1
    assert cuda_in_use()


def test_a_driver_that_has_ended_is_no_error(server: Server) -> None:
    memory = server.fetch()
    server.libcuda.statuses |= dict.fromkeys(["cuCtxPushCurrent_v2", "cuDevicePrimaryCtxRelease_v2"], 4)
    memory.close()
    assert server.client_has_ended()


def test_a_child_leaves_the_memory_to_its_parent_and_closes_its_connection(server: Server) -> None:
    """What runs in a child after a fork, run here: forking a process of many threads could hang for other reasons."""
    memory = server.fetch()
    device_memory._after_fork()
    assert server.client_has_ended()
    memory.close()
    gc.collect()
    assert (len(server.libcuda.mapped), server.libcuda.contexts) == (1, [0, 1]), "a child never calls the driver"
