"""The one boundary where errors become statuses (facts: attack 19, an exception's text must not leak)."""

from __future__ import annotations

import concurrent.futures
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog

from stepwire import errors
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.error_details import error_from_call
from stepwire_server.engines.cpu.engine import CpuState
from stepwire_server.rpc.interceptor import ErrorInterceptor

PATIENCE_SECONDS = 120.0
SECRET = "password=hunter2 at /srv/secret.py\nTraceback"
Behavior = Callable[[Any, grpc.ServicerContext], Any]


class Service:
    """A server of four methods, one a kind, that do what a test says."""

    kinds = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler,
        "UnaryStream": grpc.unary_stream_rpc_method_handler,
        "StreamUnary": grpc.stream_unary_rpc_method_handler,
        "StreamStream": grpc.stream_stream_rpc_method_handler,
    }

    def __init__(self) -> None:
        self.behavior: Behavior = lambda request, context: b""
        self._handlers = concurrent.futures.ThreadPoolExecutor(4)
        self._server = grpc.server(
            self._handlers,
            interceptors=[ErrorInterceptor()],
            handlers=[
                grpc.method_handlers_generic_handler(
                    "test", {name: kind(self._handler(name)) for name, kind in self.kinds.items()}
                )
            ],
        )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}")
        self._server.start()

    def _handler(self, name: str) -> Behavior:
        if name.endswith("Unary"):
            return lambda request, context: self.behavior(request, context)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield from self.behavior(request, context)

        return stream

    def call(self, name: str) -> list[bytes]:
        """Send one message and return every answer."""
        return list(self.channel.stream_stream(f"/test/{name}")(iter([b"hello"]), timeout=PATIENCE_SECONDS))

    def close(self) -> None:
        """Stop, and wait for every handler to return. Closing twice is harmless."""
        self.channel.close()
        self._server.stop(0).wait()
        self._handlers.shutdown()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def raising(error: Exception, before: tuple[bytes, ...] = ()) -> Behavior:
    """Raise, in a stream after some messages."""

    def behavior(request: Any, context: grpc.ServicerContext) -> Any:
        if not before:
            raise error
        return stream()

    def stream() -> Iterator[bytes]:
        yield from before
        raise error

    return behavior


def failure(service: Service, name: str) -> tuple[errors.StepwireError, grpc.RpcError]:
    with pytest.raises(grpc.RpcError) as failed:
        service.call(name)
    return error_from_call(failed.value), failed.value


@pytest.mark.parametrize("name", Service.kinds)
def test_answers_pass(service: Service, name: str) -> None:
    service.behavior = lambda request, context: b"a" if name.endswith("Unary") else iter([b"a", b"b"])
    assert service.call(name) == ([b"a"] if name.endswith("Unary") else [b"a", b"b"])


@pytest.mark.parametrize("name", Service.kinds)
def test_an_error_of_ours_goes_by_the_table(service: Service, name: str) -> None:
    service.behavior = raising(errors.FencedError("taken", metadata={"slot": 0}, retry_after_seconds=0.5))
    with structlog.testing.capture_logs() as logs:
        error, call = failure(service, name)
    assert isinstance(call, grpc.Call)
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (type(error), str(error), error.reason) == (errors.FencedError, "taken", errors.Reason.FENCED)
    assert (error.metadata, error.retry_after_seconds) == ({"slot": "0"}, 0.5)
    assert [(entry["event"], entry["method"], entry["reason"], entry["error"]) for entry in logs] == [
        ("call refused", f"/test/{name}", "FENCED", "taken")
    ]


@pytest.mark.parametrize("name", ["UnaryStream", "StreamStream"])
def test_what_was_sent_before_an_error_arrives(service: Service, name: str) -> None:
    service.behavior = raising(errors.StateChangedError("moved"), (b"one", b"two"))
    call = service.channel.stream_stream(f"/test/{name}")(iter([b"x"]), timeout=PATIENCE_SECONDS)
    assert [next(call), next(call)] == [b"one", b"two"]
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("error", [ValueError(SECRET), KeyError(SECRET), OSError(5, SECRET), RuntimeError()])
@pytest.mark.parametrize("name", Service.kinds)
def test_an_unexpected_error_is_internal_and_keeps_its_text_to_the_log(
    service: Service, name: str, error: Exception
) -> None:
    service.behavior = raising(error)
    with structlog.testing.capture_logs() as logs:
        told, call = failure(service, name)
    assert isinstance(call, grpc.Call)
    assert call.code() is grpc.StatusCode.INTERNAL
    assert (type(told), told.reason) == (errors.ServerError, errors.Reason.INTERNAL)
    incident = told.metadata["incident"]
    assert re.fullmatch("[0-9a-f]{16}", incident)
    assert str(told) == f"internal error {incident}; the server's log explains it"
    wire = repr((call.details(), call.trailing_metadata(), call.initial_metadata()))
    assert not any(word in wire for word in ("hunter2", "secret", "Traceback", type(error).__name__))
    assert [entry["exc_info"] for entry in logs if entry["event"] == "unexpected error"] == [error]
    assert {entry["incident"] for entry in logs if "incident" in entry} == {incident}


def test_incidents_have_ids_of_their_own(service: Service) -> None:
    service.behavior = raising(ValueError(SECRET))
    incidents = {failure(service, "UnaryUnary")[0].metadata["incident"] for _ in range(5)}
    assert len(incidents) == 5


def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        service.call("Nothing")
    assert isinstance(failed.value, grpc.Call)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_has_gone_is_no_error(service: Service) -> None:
    """GRPC raises out of the request iterator then; there is nobody to tell, and nothing to log."""
    begun, over = threading.Event(), threading.Event()

    def behavior(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        begun.set()
        try:
            yield from messages
        finally:
            over.set()

    service.behavior = behavior
    wait = threading.Event()
    with structlog.testing.capture_logs() as logs:
        call = service.channel.stream_stream("/test/StreamStream")(iter(lambda: wait.wait(PATIENCE_SECONDS), True))
        assert begun.wait(PATIENCE_SECONDS)
        call.cancel()
        assert over.wait(PATIENCE_SECONDS)
        service.close()
        wait.set()
    assert logs == []


@pytest.mark.parametrize(
    ("error", "events"),
    [
        (errors.FencedError("taken"), ["call refused"]),
        (ValueError(SECRET), ["unexpected error", "call refused"]),
    ],
)
@pytest.mark.parametrize("name", Service.kinds)
def test_an_error_after_the_client_has_gone_is_logged_as_any_other(
    service: Service, caplog: pytest.LogCaptureFixture, name: str, error: Exception, events: list[str]
) -> None:
    """And not a second time, with a trace, by gRPC."""
    begun, gone = threading.Event(), threading.Event()

    def behavior(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(gone.set)
        begun.set()
        assert gone.wait(PATIENCE_SECONDS)
        raise error

    service.behavior = behavior
    with structlog.testing.capture_logs() as logs:
        call = service.channel.stream_stream(f"/test/{name}")(iter([b"x"]), timeout=PATIENCE_SECONDS)
        assert begun.wait(PATIENCE_SECONDS)
        call.cancel()
        assert gone.wait(PATIENCE_SECONDS)
        service.close()
    assert [entry["event"] for entry in logs] == events
    assert [record.message for record in caplog.records if record.name.startswith("grpc")] == []


@pytest.mark.parametrize("unary", [False, True])
def test_a_device_that_fails_in_a_step_tells_an_id_and_damages_the_session(
    live: Any, refusal: Any, monkeypatch: pytest.MonkeyPatch, unary: bool
) -> None:
    """Over the wire: one group is stepped, the other is not, and from then on nothing is."""
    update, updates = CpuState.update, 0

    def failing(*arguments: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == 2:
            raise RuntimeError(SECRET)
        update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CpuState, "update", failing)
        with structlog.testing.capture_logs() as logs:
            refused = refusal(
                lambda: live.wire.unary("Step", live.unary_step(2)) if unary else live.step(2), "INTERNAL", "INTERNAL"
            )
    assert re.fullmatch("internal error [0-9a-f]{16}; the server's log explains it", refused.text)
    assert "hunter2" not in repr((refused.text, refused.metadata))
    assert [str(entry["exc_info"]) for entry in logs if entry["event"] == "unexpected error"] == [SECRET]
    text = f"session {live.id} was damaged when step 2 failed half-way"
    for call in (
        lambda: live.step(2),
        lambda: live.step(1),
        lambda: live.wire.unary("Step", live.unary_step(2)),
        lambda: live.wire.pull(live.id, "param"),
        lambda: live.load(live.load_opening(2), live.load_chunk(commit=True)),
    ):
        refusal(call, "DATA_LOSS", "SESSION_DAMAGED", text)
    assert live.wire.get(live.id).applied_step == 1
    live.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))


def test_a_device_that_fails_in_a_worker_is_told_the_same(
    wire: Any, make_config: Any, make_live: Any, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large step runs outside the handler's thread; some of its answer has been sent when it fails."""
    live = make_live(wire, wire.create(make_config((40_000,))))
    update = CpuState.update

    def failing(state: Any, step: Any, start: int, *arguments: Any) -> Any:
        if start:
            raise RuntimeError(SECRET)
        return update(state, step, start, *arguments)

    frames = [live.frame(offset, min(16_000, 40_000 - offset)) for offset in range(0, 40_000, 16_000)]
    opening = pb.AttachRequest(begin=step_pb2.StepBegin(step=1))
    with monkeypatch.context() as patch:
        patch.setattr(CpuState, "update", failing)
        refused = refusal(
            lambda: live.attach(opening, *frames, pb.AttachRequest(commit=step_pb2.StepCommit())),
            "INTERNAL",
            "INTERNAL",
            "internal error",
        )
    assert len(refused.answers) == 2
    refusal(lambda: wire.pull(live.id, "param"), "DATA_LOSS", "SESSION_DAMAGED", "step 1 failed half-way")
