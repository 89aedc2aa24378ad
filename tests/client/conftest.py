"""Servers to talk to, real and scripted, and a float64 Adam to compare with."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Retry
from stepwire.v1 import optimizer_service_pb2 as pb
from tests.support.numpy_server import numpy_server

CHUNK_BYTES = 64 << 10
_METHODS = {
    "Attach": grpc.stream_stream_rpc_method_handler,
    "Step": grpc.unary_unary_rpc_method_handler,
    "Pull": grpc.unary_stream_rpc_method_handler,
    "Load": grpc.stream_unary_rpc_method_handler,
    "GetServerInfo": grpc.unary_unary_rpc_method_handler,
    "CreateSession": grpc.unary_unary_rpc_method_handler,
}


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    """A server whose messages hold 64 KiB, so that models of a few hundred KiB take several. It compiles nothing."""
    with numpy_server(max_chunk_bytes=CHUNK_BYTES, sweep_seconds=0.05) as server:
        yield server.target


@pytest.fixture
def client(target: str) -> Iterator[stepwire.Client]:
    with stepwire.connect(target, timeout=120.0) as client:
        yield client


@pytest.fixture
def patient() -> Retry:
    """Repeats without pausing."""
    return Retry(sleep=lambda seconds: None, uniform=lambda low, high: 0.0)


class ScriptedServer:
    """A server on a real socket that does what a test tells it; a method nobody scripted is UNIMPLEMENTED.

    Attributes:
        target: where to connect.
        released: set when the test is over, for behaviours that never answer.
    """

    def __init__(self) -> None:
        self.released = threading.Event()
        self._behaviors: dict[str, Callable[..., Any]] = {}
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def on(self, method: str, behavior: Callable[..., Any]) -> None:
        """Answer a method with `behavior(request or messages, context)`, all in bytes."""
        self._behaviors[method] = behavior

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Find a method, as gRPC asks."""
        method = details.method.rpartition("/")[2]
        behavior = self._behaviors.get(method)
        return _METHODS[method](behavior) if behavior else None

    def close(self) -> None:
        """Stop, and wait until it has."""
        self.released.set()
        self._server.stop(0).wait()


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def scripted_calls(scripted: ScriptedServer, patient: Retry) -> Iterator[Calls]:
    calls = Calls(scripted.target, timeout_seconds=30.0, retry=patient)
    yield calls
    calls.close()


@pytest.fixture
def server_info() -> bytes:
    """What a scripted server says of itself."""
    info = pb.GetServerInfoResponse(version="0", protocol_min=1, protocol_max=1)
    info.limits.max_chunk_bytes = CHUNK_BYTES
    return info.SerializeToString()


class ReferenceAdam:
    """Adam in float64 for dicts of arrays, from the paper's algorithm 1, with the options that stepwire serves."""

    def __init__(self, parameters: dict[str, Any], optimizer: stepwire.Adam) -> None:
        self.p = {name: np.asarray(value).astype(np.float64) for name, value in parameters.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.largest = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.t = 0
        self.optimizer = optimizer

    def step(self, gradients: dict[str, Any], **overrides: Any) -> dict[str, np.ndarray]:
        """Take a step, perhaps with other numbers, and return the new parameters."""
        self.t += 1
        numbers = self.optimizer.hyperparameters().replace(overrides)
        for name, gradient in gradients.items():
            self.step_one(name, np.asarray(gradient).astype(np.float64), numbers)
        return self.p

    def step_one(self, name: str, g: np.ndarray, numbers: stepwire.Hyperparameters) -> None:
        """Update one tensor."""
        p, correct = self.p[name], self.optimizer.formula != "no_bias_correction"
        g = -g if numbers.maximize else g
        if self.optimizer.decoupled_weight_decay:
            p = p * (1 - numbers.lr * numbers.weight_decay)
        else:
            g = g + numbers.weight_decay * p
        self.m[name] = m = numbers.beta1 * self.m[name] + (1 - numbers.beta1) * g
        self.v[name] = v = numbers.beta2 * self.v[name] + (1 - numbers.beta2) * g * g
        if self.optimizer.amsgrad:
            self.largest[name] = v = np.maximum(self.largest[name], v)
        c1 = 1 - numbers.beta1**self.t if correct else 1.0
        c2 = 1 - numbers.beta2**self.t if correct else 1.0
        self.p[name] = p - numbers.lr * (m / c1) / (np.sqrt(v / c2) + numbers.eps)


@pytest.fixture
def reference_adam() -> type[ReferenceAdam]:
    return ReferenceAdam
