"""Servers, and a client that speaks raw messages: it can say what the real one never would."""

from __future__ import annotations

import logging
import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import structlog

from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, state_pb2, status_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.config import MIB, ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.support.lane_wire import LaneWire

pytest.register_assert_rewrite("tests.server.model.runner")

PATIENCE_SECONDS = 120.0
CHUNK_BYTES = 64 << 10
BUDGET_BYTES = 256 * MIB
SLOTS = ("param", "exp_avg", "exp_avg_sq")


class Message(Protocol):
    """What is sent: a protobuf message, or bytes that only claim to be one."""

    def SerializeToString(self) -> bytes: ...


Sent = Message | bytes


class Refused(Exception):
    """A call's end with a status.

    Attributes:
        code: the gRPC status code's name.
        reason: of the ErrorInfo; empty when gRPC itself refused.
        text: the status's text.
        metadata: of the ErrorInfo.
        retry_after: seconds of the RetryInfo; None without one.
        answers: messages that came before the status.
    """

    def __init__(self, error: grpc.RpcError, answers: list[bytes]) -> None:
        super().__init__(error)
        assert isinstance(error, grpc.Call)
        info, retry = status_pb2.ErrorInfo(), status_pb2.RetryInfo()
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                for detail in status_pb2.RichStatus.FromString(value).details:
                    (info if detail.type_url.endswith("ErrorInfo") else retry).ParseFromString(detail.value)
        self.code = error.code().name
        self.reason = info.reason
        self.text = error.details() or ""
        self.metadata = dict(info.metadata)
        self.retry_after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
        self.answers = answers


def packed(message: Sent) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


class Wire:
    """A channel of its own to a server. A context manager."""

    def __init__(self, target: str, **options: int) -> None:
        """Open it; `options` are channel arguments without their prefix `grpc.`."""
        arguments = {"use_local_subchannel_pool": 1, "max_receive_message_length": -1} | options
        self._channel = grpc.insecure_channel(target, [(f"grpc.{name}", value) for name, value in arguments.items()])

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    def unary(self, method: str, request: Sent, metadata: Any = None) -> bytes:
        """Call a method with one request and one answer."""
        call = self._channel.unary_unary(_path(method))
        try:
            answer: bytes = call(packed(request), timeout=PATIENCE_SECONDS, metadata=metadata)
            return answer
        except grpc.RpcError as error:
            raise Refused(error, []) from None

    def stream(self, method: str, requests: Iterable[Sent]) -> list[bytes]:
        """Call a streaming method of any kind, send everything, and return every answer."""
        call = self._channel.stream_stream(_path(method))(map(packed, requests), timeout=PATIENCE_SECONDS)
        answers: list[bytes] = []
        try:
            answers.extend(call)
        except grpc.RpcError as error:
            raise Refused(error, answers) from None
        return answers

    def open(self, method: str = "Attach") -> OpenStream:
        """Begin a stream whose messages are sent one by one."""
        return OpenStream(self._channel.stream_stream(_path(method)))

    # --- what sessions need -------------------------------------------------------------------------------

    def info(self) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse.FromString(self.unary("GetServerInfo", pb.GetServerInfoRequest()))

    def reserved_bytes(self) -> int:
        return self.info().devices[0].reserved_bytes

    def create(self, config: session_pb2.SessionConfig, request_id: str | None = None) -> pb.CreateSessionResponse:
        request = pb.CreateSessionRequest(request_id=request_id or secrets.token_hex(8), config=config)
        return pb.CreateSessionResponse.FromString(self.unary("CreateSession", request))

    def get(self, session_id: str) -> session_pb2.Session:
        answer = self.unary("GetSession", pb.GetSessionRequest(session_id=session_id))
        return pb.GetSessionResponse.FromString(answer).session

    def pull(self, session_id: str, *slots: str, **options: Any) -> tuple[state_pb2.PullHeader, dict[str, bytes]]:
        """Pull slots; returns the header and each slot's bytes."""
        request = pb.PullRequest(session_id=session_id, slots=slots, **options)
        first, *chunks = map(pb.PullResponse.FromString, self.stream("Pull", [request]))
        values = dict.fromkeys(slots, b"")
        for chunk in chunks:
            values[chunk.slot] = values.get(chunk.slot, b"") + chunk.payload
        return first.header, values


class OpenStream:
    """A stream under way: what is sent is on its way at once, and each answer is waited for."""

    def __init__(self, method: Any) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = method(iter(self._outbox.get, None), timeout=PATIENCE_SECONDS)

    def send(self, *messages: Sent) -> None:
        for message in messages:
            self._outbox.put(packed(message))

    def receive(self) -> bytes:
        """Return the next answer.

        Raises:
            Refused: the stream ended with a status.
            StopIteration: it ended well.
        """
        try:
            answer: bytes = next(self._call)
            return answer
        except grpc.RpcError as error:
            raise Refused(error, []) from None

    @property
    def over(self) -> bool:
        """The stream has ended."""
        return not self._call.is_active()

    def finish(self) -> None:
        """Say that no more will come."""
        self._outbox.put(None)

    def cancel(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


def _path(method: str) -> str:
    return f"/stepwire.v1.OptimizerService/{method}"


class Live:
    """A session on the server, seen from a raw client that holds its worker.

    Attributes:
        wire: the client.
        id: the session's id.
        token: the newest `attach_token` that the client knows.
        first_token: the one that it got when it created the session.
        size: elements of its flat space.
    """

    def __init__(self, wire: Wire, created: pb.CreateSessionResponse) -> None:
        self.wire = wire
        self.id = created.session.session_id
        self.token = self.first_token = created.attach_token
        self.size = created.session.layout.size

    def opening(self, **fields: Any) -> pb.AttachRequest:
        """Make the first message of a stream."""
        return pb.AttachRequest(
            open=attach_pb2.AttachOpen(**{"session_id": self.id, "attach_token": self.token} | fields)
        )

    def gradient(self, seed: int = 1) -> npt.NDArray[np.float32]:
        """Draw a gradient of the whole space."""
        return np.random.default_rng(seed).standard_normal(self.size).astype(np.float32)

    def frame(
        self, offset: int = 0, count: int | None = None, *, begin: Any = None, commit: bool = False, payload: Any = None
    ) -> pb.AttachRequest:
        """Make a message with a chunk; `begin` is a step's number or a whole `StepBegin`."""
        count = self.size - offset if count is None else count
        payload = self.gradient()[offset : offset + count] if payload is None else payload
        message = pb.AttachRequest(
            chunk=tensor_pb2.Chunk(offset=offset, count=count),
            payload=payload if isinstance(payload, bytes) else payload.tobytes(),
        )
        if begin is not None:
            message.begin.CopyFrom(step_pb2.StepBegin(step=begin) if isinstance(begin, int) else begin)
        if commit:
            message.commit.SetInParent()
        return message

    def attach(self, *frames: Sent) -> list[pb.AttachResponse]:
        """Open a stream, send everything, end it, and return the replies but the opening's."""
        try:
            replies = self.wire.stream("Attach", [self.opening(), *frames])
        except Refused as refused:
            self.attached(*refused.answers[:1])
            raise
        self.attached(*replies[:1])
        return [pb.AttachResponse.FromString(reply) for reply in replies[1:]]

    def attached(self, *opened: bytes) -> None:
        """Note the newest token, from the first message of a stream; nothing where none came."""
        for message in opened:
            self.token = pb.AttachResponse.FromString(message).opened.attach_token

    def step(self, step: int, gradient: npt.NDArray[Any] | None = None) -> step_pb2.StepResult:
        """Apply a step."""
        gradient = self.gradient(step) if gradient is None else gradient
        return self.attach(self.frame(begin=step, commit=True, payload=gradient))[-1].result

    def unary_step(self, step: int, **fields: Any) -> pb.StepRequest:
        """Make a unary step's request."""
        defaults: dict[str, Any] = {
            "session_id": self.id,
            "attach_token": self.token,
            "begin": step_pb2.StepBegin(step=step),
            "payload": self.gradient(step).tobytes(),
        }
        return pb.StepRequest(**defaults | fields)

    def load_opening(self, load: int, *slots: str, **fields: Any) -> pb.LoadRequest:
        """Make the first message of a load."""
        defaults = {"session_id": self.id, "attach_token": self.token, "load": load, "slots": slots or ("param",)}
        return pb.LoadRequest(open=state_pb2.LoadOpen(**defaults | fields))

    def load_chunk(
        self, slot: str = "param", offset: int = 0, values: npt.NDArray[Any] | None = None, **fields: Any
    ) -> pb.LoadRequest:
        """Make a chunk of a load: `values`, or the whole space drawn anew."""
        values = self.gradient(7) if values is None else values
        chunk = tensor_pb2.Chunk(offset=offset, count=len(values))
        return pb.LoadRequest(**{"slot": slot, "chunk": chunk, "payload": values.tobytes()} | fields)

    def load(self, *messages: Sent) -> pb.LoadResponse:
        """Send a load."""
        return pb.LoadResponse.FromString(self.wire.stream("Load", messages)[-1])

    def fingerprint(self) -> tuple[Any, ...]:
        """Return everything that a refused request must leave as it was, bit for bit."""
        session = self.wire.get(self.id)
        for volatile in ("expire_time", "create_time", "attached", "idle"):
            session.ClearField(volatile)  # type: ignore[arg-type]
        header, values = self.wire.pull(self.id, *session.layout.slots)
        return session.SerializeToString(deterministic=True), header.SerializeToString(deterministic=True), values


def adam_config(*shapes: tuple[int, ...], **fields: Any) -> session_pb2.SessionConfig:
    """Make a config of tensors t0, t1, … in one group, to start from zeros."""
    defaults: dict[str, Any] = {
        "tensors": [tensor_pb2.TensorSpec(name=f"t{index}", shape=shape) for index, shape in enumerate(shapes)],
        "optimizer": optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
        "initialization": session_pb2.INITIALIZATION_ZEROS,
    }
    return session_pb2.SessionConfig(**defaults | fields)


def server_config(**settings: Any) -> ServerConfig:
    return ServerConfig(
        bind="127.0.0.1:0",
        device="cpu",
        threads=1,
        max_chunk_bytes=CHUNK_BYTES,
        memory_budget=BUDGET_BYTES,
        max_tensors=64,
        sweep_seconds=0.05,
        **settings,
    )


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server(server_config()) as server:
        yield server


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Undo what `configure_logging` does to the whole process."""
    root, ours, before = logging.getLogger(), logging.getLogger("stepwire_server"), structlog.get_config()
    handlers, level = list(root.handlers), ours.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    ours.setLevel(level)
    structlog.configure(**before)


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.target) as wire:
        yield wire


@pytest.fixture(scope="session")
def lane_server() -> Iterator[Server]:
    """A server that shares no memory: its lanes have packets alone, which reserve nothing."""
    with Server(server_config(shared_memory=False)) as server:
        yield server


@pytest.fixture(params=["streams", "packets", "compiled"])
def wire_of_each_kind(lane_server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A channel whose streams are gRPC's own, or have packet lanes, whose next steps a loop has or has not.

    The lanes were taken, or the test fails.
    """
    if request.param == "compiled":
        pytest.importorskip("numba")
    with Wire(lane_server.target) as wire, pytest.MonkeyPatch.context() as patched:
        if request.param == "streams":
            yield wire
            return
        compiled = request.param == "compiled"
        for name in ("after_steps", "steps_alike"):
            patched.setattr(lane_server.lanes, name, 1 if compiled else 1 << 30)
        on_lanes = LaneWire(wire, lane_server if compiled else None)
        yield on_lanes
        assert on_lanes.lanes > 0 or "live" not in request.fixturenames  # which has stepped
        assert not compiled or on_lanes.lanes - on_lanes.fresh == on_lanes.grants


@pytest.fixture(scope="session")
def connect() -> type[Wire]:
    """Open further channels: `connect(target, **channel_arguments)`."""
    return Wire


@pytest.fixture(scope="session")
def make_config() -> Callable[..., session_pb2.SessionConfig]:
    return adam_config


@pytest.fixture(scope="session")
def make_live() -> type[Live]:
    return Live


@pytest.fixture
def live(wire: Wire) -> Live:
    """A session of three tensors and two groups, with padding between them, one step old."""
    creating = getattr(wire, "creating", {})  # of a wire whose streams have compiled lanes
    groups = [optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()]
    config = adam_config((3, 4), (5,), groups=groups, **creating)
    config.tensors.add(name="last", shape=[7], group=1)
    session = Live(wire, wire.create(config))
    session.load(session.load_opening(1), session.load_chunk(commit=True))
    session.step(1)
    return session


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def serve(clock: Clock) -> Callable[..., Server]:
    """Make servers of the test's own, on the test's clock, with any settings and devices."""

    def make(*, pool: DevicePool | None = None, **settings: Any) -> Server:
        defaults = {"bind": "127.0.0.1:0", "device": "cpu", "threads": 1, "sweep_seconds": 0.01}
        return Server(ServerConfig(**defaults | settings), clock=clock, pool=pool)

    return make


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], None]:
    """Look again and again until something is true that another thread is about to make true."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it did not come true"

    return wait


class Refusal(Protocol):
    """See `refusal`."""

    def __call__(
        self, call: Callable[[], object], code: str, reason: str, *texts: object, field: str | None = None
    ) -> Refused: ...


@pytest.fixture
def refusal() -> Refusal:
    """Make a call that must be refused: with this code and reason, a text that holds the values, and this field."""

    def check(call: Callable[[], object], code: str, reason: str, *texts: object, field: str | None = None) -> Refused:
        with pytest.raises(Refused) as caught:
            call()
        refused = caught.value
        assert (refused.code, refused.reason) == (code, reason), refused.text
        for text in texts:
            assert str(text) in refused.text
        if field is not None:
            assert refused.metadata.get("field") == field
        return refused

    return check


@pytest.fixture
def untouched(live: Live, refusal: Refusal) -> Iterator[Refusal]:
    """As `refusal`; afterwards `live` must be as it was in every bit, and no byte more may be reserved."""
    before, reserved = live.fingerprint(), live.wire.reserved_bytes()
    yield refusal
    assert live.fingerprint() == before
    assert live.wire.reserved_bytes() == reserved
