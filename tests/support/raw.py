"""A client in plain gRPC and generated code, as another language would have it.

Nothing is numbered, repeated or hidden for the test, and every message is ordinary protobuf, payload included.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from stepwire.wire.error_details import error_from_call

__all__ = ["RawClient", "RawStream", "Refused", "commit", "step_message"]

PATIENCE_SECONDS = 300.0  # only bounds a test that would hang: a stream lives as long as its test

Vector = npt.NDArray[np.float32]


class Refused(Exception):
    """A call that failed: its status code, and the reason, metadata and delay of its details."""

    def __init__(self, call: grpc.RpcError) -> None:
        """Read a failed call."""
        assert isinstance(call, grpc.Call)
        error = error_from_call(call)
        super().__init__(str(error))
        self.code = call.code().name
        self.reason = str(error.reason)
        self.metadata = error.metadata
        self.retry_after_seconds = error.retry_after_seconds

    @property
    def row(self) -> tuple[str, str]:
        """Code and reason: a row of the table of errors."""
        return self.code, self.reason


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise Refused(error) from None


def step_message(
    step: int, gradient: Vector, part: slice = slice(None), *, begin: bool = True, commit: bool = True, epoch: int = 0
) -> pb.AttachRequest:
    """Build a message of a step: a range of the gradient, with the opening and the end of the step."""
    message = pb.AttachRequest(payload=gradient[part].tobytes())
    start, end, _ = part.indices(len(gradient))
    message.chunk.CopyFrom(tensor_pb2.Chunk(offset=start, count=end - start))
    if begin:
        message.begin.CopyFrom(step_pb2.StepBegin(step=step, epoch=epoch))
    if commit:
        message.commit.SetInParent()
    return message


def commit() -> pb.AttachRequest:
    """Build the message that ends a step and brings nothing."""
    return pb.AttachRequest(commit=step_pb2.StepCommit())


class RawStream:
    """An attached stream that sends the messages that it is given.

    Attributes:
        token: the token of its attach, once the server's first message has been received; 0 before.
    """

    def __init__(self, stub: OptimizerServiceStub, opening: attach_pb2.AttachOpen) -> None:
        self._outbox: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        self.token = 0
        self._call = stub.Attach(iter(self._outbox.get, None), timeout=PATIENCE_SECONDS)
        self.send(pb.AttachRequest(open=opening))

    def send(self, message: pb.AttachRequest) -> None:
        """Send one message."""
        self._outbox.put(message)

    def receive(self) -> pb.AttachResponse | None:
        """Return the next message; None when the server has ended the stream well."""
        with _refusals():
            message: pb.AttachResponse | None = next(self._call, None)
        if message is not None and message.HasField("opened"):
            self.token = message.opened.attach_token
        return message

    def step(self, *messages: pb.AttachRequest) -> step_pb2.StepResult:
        """Send a step's messages and return its result."""
        for message in messages:
            self.send(message)
        while (answer := self.receive()) is not None:
            if answer.HasField("result"):
                return answer.result
        raise AssertionError("the stream ended without a result")

    def finish(self) -> None:
        """Say that nothing more will come."""
        self._outbox.put(None)

    def cancel(self) -> None:
        """Reset the stream."""
        self.finish()
        self._call.cancel()


class RawClient:
    """A channel of its own to one server. A context manager."""

    def __init__(self, target: str, *options: tuple[str, int]) -> None:
        self._channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1), *options])
        self._stub = OptimizerServiceStub(self._channel)
        self._streams: list[RawStream] = []

    def call(self, method: str, request: Any) -> Any:
        """Call a unary method."""
        with _refusals():
            return getattr(self._stub, method)(request, timeout=PATIENCE_SECONDS)

    def info(self) -> pb.GetServerInfoResponse:
        """Ask the server how it is."""
        answer: pb.GetServerInfoResponse = self.call("GetServerInfo", pb.GetServerInfoRequest())
        return answer

    def create(
        self, size: int = 12, *, request_id: str | None = None, lr: float = 1e-2, zeros: bool = True
    ) -> pb.CreateSessionResponse:
        """Create a session of one tensor, of zeros or to be loaded."""
        config = session_pb2.SessionConfig(
            tensors=[tensor_pb2.TensorSpec(name="w", shape=[size])],
            optimizer=optimizer_pb2.Optimizer(
                rule=optimizer_pb2.RULE_ADAM, hyperparameters=optimizer_pb2.Hyperparameters(lr=lr)
            ),
            initialization=session_pb2.INITIALIZATION_ZEROS if zeros else session_pb2.INITIALIZATION_LOAD,
        )
        request = pb.CreateSessionRequest(request_id=request_id or secrets.token_hex(8), config=config)
        answer: pb.CreateSessionResponse = self.call("CreateSession", request)
        return answer

    def step(self, session_id: str, token: int, step: int, gradient: Vector, *, epoch: int = 0) -> pb.StepResponse:
        """Apply a step in one call."""
        answer: pb.StepResponse = self.call("Step", step_request(session_id, token, step, gradient, epoch=epoch))
        return answer

    def step_later(self, session_id: str, token: int, step: int, gradient: Vector) -> grpc.Future:
        """Begin to apply a step in one call; `settle` awaits its answer."""
        future: grpc.Future = self._stub.Step.future(
            step_request(session_id, token, step, gradient), timeout=PATIENCE_SECONDS
        )
        return future

    def attach(self, session_id: str, token: int = 0, *, epoch: int = 0) -> RawStream:
        """Attach a stream; its first answer is for the caller to receive."""
        stream = RawStream(self._stub, attach_pb2.AttachOpen(session_id=session_id, attach_token=token, epoch=epoch))
        self._streams.append(stream)
        return stream

    def load(
        self, session_id: str, token: int, load: int, values: Vector, *, epoch: int = 0, slot: str = "param"
    ) -> pb.LoadResponse:
        """Load a slot."""
        opening = state_pb2.LoadOpen(session_id=session_id, attach_token=token, load=load, epoch=epoch, slots=[slot])
        chunk = tensor_pb2.Chunk(offset=0, count=len(values))
        messages = [
            pb.LoadRequest(open=opening),
            pb.LoadRequest(slot=slot, chunk=chunk, commit=True, payload=values.tobytes()),
        ]
        answer: pb.LoadResponse = self.call("Load", iter(messages))
        return answer

    def close(self) -> None:
        """Break every stream and the channel."""
        for stream in self._streams:
            stream.cancel()
        self._channel.close()

    def __enter__(self) -> RawClient:
        """Use the client for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def step_request(session_id: str, token: int, step: int, gradient: Vector, *, epoch: int = 0) -> pb.StepRequest:
    """Build a unary step."""
    return pb.StepRequest(
        session_id=session_id,
        attach_token=token,
        begin=step_pb2.StepBegin(step=step, epoch=epoch),
        payload=gradient.tobytes(),
    )


def settle(future: grpc.Future) -> pb.StepResponse:
    """Await a step begun by `step_later`."""
    with _refusals():
        answer: pb.StepResponse = future.result()
        return answer
