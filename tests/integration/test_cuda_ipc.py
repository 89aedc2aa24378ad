"""Memory of a pretended GPU shared by the real server with the real client, against steps in messages, bit for bit."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire.transports.cuda import driver as cuda_driver
from stepwire.transports.cuda.views import DeviceView
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.events import PATIENCE_SECONDS
from tests.integration.probes import stream_ends
from tests.integration.training import SMALL, WIDE, Model, bits, same_bits, telemetry
from tests.server.pretended_gpus import PlacedGpu, compiled_kernels, machine_code, needs_compiler, pretended_cupy
from tests.support.fake_libcuda import FakeLibcuda

pytestmark = [needs_compiler, pytest.mark.many]

_SHARED_BYTES = 2 << 20


class Shared(NamedTuple):
    """A server on a pretended GPU, and a client on the same.

    Attributes:
        cupy: the server's stand-in for CuPy, which counts memory.
        libcuda: the client's stand-in for the driver.
        server: it.
        client: it.
        idle_bytes: device memory in use without sessions.
    """

    cupy: Any
    libcuda: FakeLibcuda
    server: Server
    client: stepwire.Client
    idle_bytes: int

    def until_freed(self, more_bytes: int = 0) -> None:
        """Wait until the server has seen the end of streams and of what it had lent to them."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self.cupy.used_bytes != self.idle_bytes + more_bytes or len(self.server.handoff._loans):
            assert time.monotonic() < end, f"{self.cupy.used_bytes - self.idle_bytes - more_bytes} bytes are left"


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return compiled_kernels(request, tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    yield from machine_code(tmp_path_factory)


@pytest.fixture
def start(
    exits: contextlib.ExitStack, directory: pathlib.Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Shared]:
    """Start a server and a client: `start(transport, order=…)`."""

    def started(transport: str = "cuda_ipc", order: Any = "lazy", **options: Any) -> Shared:
        cupy = pretended_cupy(directory, devices=1, memory_bytes=32 << 20, order=order)
        libcuda = FakeLibcuda(cupy._driver)
        monkeypatch.setattr(cuda_driver, "load_library", lambda *, only_if_loaded=False: libcuda)
        exits.callback(cupy.check)
        engine = PlacedGpu(cupy, 0, buffer_bytes=16 << 10, gradient_cache_bytes=1)
        idle_bytes = cupy.used_bytes
        pool = DevicePool.of([engine], 24 << 20)
        server = exits.enter_context(Server(ServerConfig(bind="127.0.0.1:0", **settings | options), pool=pool))
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        client = stepwire.connect(server.target, transport=transport, timeout=120.0, retry=retry)
        return Shared(cupy, libcuda, server, exits.enter_context(client), idle_bytes)

    return started


def plain(shared: Shared, exits: contextlib.ExitStack) -> stepwire.Client:
    return exits.enter_context(stepwire.connect(shared.server.target, transport="tcp", timeout=120.0))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["lazy", ("random", 3)], ids=str)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (SMALL, {}),
        (WIDE, {}),
        (SMALL, {"gradient_dtype": "int8", "error_feedback": True}),
        (WIDE, {"gradient_dtype": "bfloat16", "reply_dtype": "float16", "clip_grad_norm": 0.5}),
        (WIDE, {"state_precision": "int8", "optimizer": stepwire.AdamW(lr=1e-3)}),
        (SMALL, {"accumulation_steps": 2}),
    ],
    ids=["small", "wide", "int8 gradients", "clipped", "int8 moments", "accumulated"],
)
def test_steps_are_those_of_messages(
    start: Any, exits: contextlib.ExitStack, model: Model, options: dict[str, Any], order: Any
) -> None:
    shared = start(order=order)
    with model.create(shared.client, **options) as one, model.create(plain(shared, exits), **options) as other:
        for step in range(1, 5):
            answers = [bits(session.step(model.gradient(step))) for session in (one, other)]
            assert answers[0] == answers[1]
            results = [telemetry(session.last_result)[:5] for session in (one, other)]  # norms of updates are not exact
            assert results[0] == results[1]
        assert same_bits(one.state(), other.state())
        assert (str(one.transport), str(other.transport)) == ("transport cuda_ipc", str(other.transport))
    shared.until_freed()
    assert shared.libcuda.mapped == {} and shared.libcuda.contexts == [0]


@pytest.mark.parametrize("order", ["lazy", ("random", 5)], ids=str)
def test_views_are_sent_and_answered_without_a_copy(start: Any, exits: contextlib.ExitStack, order: Any) -> None:
    shared = start(order=order)
    with SMALL.create(shared.client) as one, SMALL.create(plain(shared, exits)) as other:
        gradients, parameters = one.shared_gradients(), one.shared_parameters()
        assert bits({name: np.asarray(view) for name, view in parameters.items()}) == bits(SMALL.parameters())
        for step in range(1, 4):
            for name, values in SMALL.gradient(step).items():
                on_device(gradients[name])[...] = values
            waits, copied = shared.libcuda.synchronized, dict(shared.libcuda.copied)
            answer = one.step(gradients, out=parameters)
            assert (shared.libcuda.synchronized, shared.libcuda.copied) == (waits + 1, copied)
            expected = bits(other.step(SMALL.gradient(step)))
            assert bits({name: on_device(view).copy() for name, view in answer.items()}) == expected
            assert bits({name: np.asarray(view) for name, view in parameters.items()}) == expected


def test_views_beside_arrays_of_the_host(start: Any, exits: contextlib.ExitStack) -> None:
    shared = start()
    with SMALL.create(shared.client) as one, SMALL.create(plain(shared, exits)) as other:
        gradients = one.shared_gradients()
        for step in range(1, 3):
            sent: dict[str, Any] = SMALL.gradient(step)
            on_device(gradients["w"])[...] = sent["w"]
            assert bits(one.step(sent | {"w": gradients["w"]})) == bits(other.step(SMALL.gradient(step)))


def test_views_of_one_session_are_values_for_another(start: Any, exits: contextlib.ExitStack) -> None:
    shared = start()
    with (
        SMALL.create(shared.client) as one,
        SMALL.create(shared.client) as beside,
        SMALL.create(plain(shared, exits)) as other,
    ):
        gradients = one.shared_gradients()
        for name, values in SMALL.gradient(1).items():
            on_device(gradients[name])[...] = values
        answers = [bits(session.step(gradients)) for session in (one, beside, other)]
        assert answers == answers[:1] * 3


def test_a_gradient_on_the_device_survives_its_stream(start: Any, exits: contextlib.ExitStack) -> None:
    """The memory of the stream that broke is mapped until the step has been repeated over another."""
    shared = start()
    ended = stream_ends(shared.server.registry)
    with SMALL.create(shared.client) as one, SMALL.create(plain(shared, exits)) as other:
        gradients = one.shared_gradients()
        for name, values in SMALL.gradient(1).items():
            on_device(gradients[name])[...] = values
        shared.server.registry.streams.cancel()
        ended.wait()
        assert len(shared.server.handoff._loans) == 1
        assert bits(one.step(gradients)) == bits(other.step(SMALL.gradient(1)))
        assert (len(shared.libcuda.mapped), shared.libcuda.opened) == (2, 2)
        del gradients
        assert len(shared.libcuda.mapped) == 1
        one.detach()
    shared.until_freed()


def test_views_outlive_their_session(start: Any) -> None:
    shared = start()
    session = SMALL.create(shared.client)
    session.step(SMALL.gradient(1))
    parameters = session.shared_parameters()
    expected = bits({name: np.asarray(view) for name, view in parameters.items()})
    session.close()
    assert bits({name: np.asarray(view) for name, view in parameters.items()}) == expected
    assert shared.cupy.used_bytes == shared.idle_bytes + _SHARED_BYTES
    del parameters
    shared.until_freed()


@pytest.mark.slow
def test_two_hundred_attachments_leave_nothing(start: Any) -> None:
    shared = start()
    with SMALL.create(shared.client) as session:
        for step in range(1, 201):
            session.step(SMALL.gradient(step), reply="none")
            session.detach()
        state_bytes = session.info().memory_bytes
        shared.until_freed(state_bytes)
        assert shared.client.info().devices["cuda:0"]["reserved_bytes"] == state_bytes
    assert (shared.libcuda.opened, shared.libcuda.mapped, shared.libcuda.contexts) == (200, {}, [0])
    shared.until_freed()


def test_shared_memory_is_part_of_the_budget(start: Any) -> None:
    shared = start()
    with SMALL.create(shared.client) as session:
        before = shared.client.info().devices["cuda:0"]["reserved_bytes"]
        session.attach()
        assert shared.client.info().devices["cuda:0"]["reserved_bytes"] == before + _SHARED_BYTES


def test_what_the_budget_has_no_room_for_goes_another_way(start: Any) -> None:
    shared = start("auto", memory_budget=0)
    shared.libcuda.initialized, shared.libcuda.contexts = True, [1]
    hog = next(iter(shared.server.registry.pool)).budget.reserve((24 << 20) - (1 << 20), "a test")
    with SMALL.create(shared.client) as session:
        session.step(SMALL.gradient(1))
        assert session.transport is not None and session.transport.name == "packets"
        assert "the device memory that is shared with the client needs 2097152" in session.transport.reasons["cuda_ipc"]
    hog.release()


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [
        (
            "cuIpcOpenMemHandle_v2",
            201,
            r"fails with CUDA_ERROR_INVALID_CONTEXT \(201\); the server must be",
        ),
        ("cuDevicePrimaryCtxRetain", 999, r"cuDevicePrimaryCtxRetain fails with error 999; .*--ipc=host --pid=host"),
        ("cuMemcpyHtoD_v2", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuMemcpyDtoH_v2", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuInit", 100, "CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_what_the_client_cannot_open_goes_another_way(start: Any, function: str, status: int, text: str) -> None:
    shared = start()
    shared.libcuda.statuses[function] = status
    with SMALL.create(shared.client) as session:
        with pytest.raises(stepwire.UnsupportedFeatureError, match=text):
            session.attach(transport="cuda_ipc")
    shared.libcuda.statuses.clear()
    assert shared.libcuda.mapped == {}
    shared.until_freed()


def test_memory_that_is_not_the_servers_fails_the_check(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = start("auto")
    shared.libcuda.initialized, shared.libcuda.contexts = True, [1]
    monkeypatch.setattr(FakeLibcuda, "_cuMemcpyHtoD_v2", lambda *arguments: 0)
    with SMALL.create(shared.client) as session:
        session.step(SMALL.gradient(1))
        assert session.transport is not None and session.transport.name == "packets"
        assert "check.pattern: it is not in the memory" in session.transport.reasons["cuda_ipc"]
    shared.until_freed()


def test_a_gpu_that_the_client_does_not_see(start: Any) -> None:
    shared = start()
    shared.libcuda.uuids = [b"x" * 16]
    with SMALL.create(shared.client) as session:
        with pytest.raises(stepwire.UnsupportedFeatureError, match="does not see the server's GPU GPU-00007072-6574-"):
            session.attach()


def test_a_gpu_without_ipc(start: Any) -> None:
    shared = start()
    shared.cupy.libcuda.statuses["cuIpcGetMemHandle"] = 801
    with SMALL.create(shared.client) as session:
        with pytest.raises(stepwire.UnsupportedFeatureError, match=r"CUDA_ERROR_NOT_SUPPORTED.*--ipc=host --pid=host"):
            session.attach()
        shared.cupy.libcuda.statuses.clear()
        session.attach()
        assert str(session.transport) == "transport cuda_ipc"


def test_a_server_that_is_told_not_to(start: Any) -> None:
    shared = start(cuda_ipc=False)
    assert "transport_cuda_ipc" not in shared.client.info().features
    with pytest.raises(stepwire.UnsupportedFeatureError, match="--no-cuda-ipc"):
        SMALL.create(shared.client)


def test_a_program_that_uses_no_gpu_is_left_so(start: Any) -> None:
    shared = start("auto")
    with SMALL.create(shared.client) as session:
        session.attach()
        assert session.transport is not None and session.transport.name == "packets"
        assert session.transport.reasons["cuda_ipc"].startswith("this process does nothing on a GPU; ")
        assert (shared.libcuda.contexts, shared.libcuda.initialized) == ([0], False)
        shared.libcuda.initialized, shared.libcuda.contexts = True, [1]
        session.detach()
        session.attach(transport="cuda_ipc")
        session.attach(transport="auto")
        assert session.transport.name == "cuda_ipc"


def test_a_server_that_ends_waits_for_its_clients_and_no_longer(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = start()
    session = SMALL.create(shared.client)
    parameters = session.shared_parameters()
    monkeypatch.setattr(type(shared.server.handoff._loans).close, "__defaults__", (0.0,))
    shared.server.close()
    assert shared.cupy.used_bytes == shared.idle_bytes
    shared.cupy._driver.memories.faults.clear()
    del parameters
    session.detach()
    assert shared.cupy.faults == [f"device memory of {_SHARED_BYTES} bytes freed while another process maps it"]
    shared.cupy._driver.memories.faults.clear()


def on_device(view: DeviceView) -> np.ndarray:
    """Take a view as a library of the GPU would: by its interface alone."""
    interface = view.__cuda_array_interface__
    assert (interface["version"], interface["stream"], interface["strides"]) == (3, None, None)
    address, read_only = interface["data"]
    assert not read_only
    dtype = np.dtype(interface["typestr"])
    count = int(np.prod(interface["shape"], dtype=np.int64))
    memory = (np.ctypeslib.ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    values = np.frombuffer(memory, dtype).reshape(interface["shape"])
    return values.view(ml_dtypes.bfloat16) if view.dtype.name == "bfloat16" else values
