"""Errors as trailers: written by the server, read by the client, and by anybody's google.rpc library."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from stepwire import errors
from stepwire.errors import Reason, ServerError, StepMismatchError
from stepwire.v1 import status_pb2
from stepwire.wire.error_details import error_from_call, error_from_details, status_details, status_of

TRAILER = "grpc-status-details-bin"


class FinishedCall(grpc.RpcError, grpc.Call):
    """A failed call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers: Any) -> None:
        self._end = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._end[0]

    def details(self) -> str | None:
        return self._end[1]

    def trailing_metadata(self) -> Any:
        return self._end[2]

    def initial_metadata(self) -> Any:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> None: ...

    def add_callback(self, callback: Any) -> bool:
        return False


def failed(error: errors.StepwireError) -> FinishedCall:
    status = status_of(error)
    return FinishedCall(status.code, status.details, status.trailing_metadata)


def test_a_status_carries_code_text_and_reason() -> None:
    status = status_of(errors.StepMismatchError("step 9", metadata={"expected_step": 7, "actual_step": 9}))
    (key, data), *others = status.trailing_metadata
    rich = status_pb2.RichStatus.FromString(data)
    info = status_pb2.ErrorInfo.FromString(rich.details[0].value)
    assert (status.code, status.details) == (grpc.StatusCode.ABORTED, "step 9")
    assert (key, others, rich.code, rich.message) == (TRAILER, [], 10, "step 9")
    assert (info.reason, info.domain) == ("STEP_MISMATCH", "stepwire")
    assert dict(info.metadata) == {"expected_step": "7", "actual_step": "9"}


def test_the_details_are_googles_to_the_byte() -> None:
    """Other clients read them with `google.rpc` messages; ours are copies that must not drift."""
    google_status = pytest.importorskip("google.rpc.status_pb2")
    google_details = pytest.importorskip("google.rpc.error_details_pb2")
    error = errors.UnavailableError("bye", reason=Reason.SHUTTING_DOWN, metadata={"a": "1"}, retry_after_seconds=1.25)
    rich = google_status.Status.FromString(status_of(error).trailing_metadata[0][1])
    info, retry = google_details.ErrorInfo(), google_details.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert rich.details[1].Unpack(retry)
    assert (rich.code, rich.message) == (14, "bye")
    assert (info.reason, info.domain, dict(info.metadata)) == ("SHUTTING_DOWN", "stepwire", {"a": "1"})
    assert retry.retry_delay.ToNanoseconds() == 1_250_000_000


@pytest.mark.parametrize("retry_after", [None, 0.0, 0.25, 3600.0])
def test_an_error_survives_the_way_there_and_back(retry_after: float | None) -> None:
    sent = errors.ResourceExhaustedError("no room", metadata={"requested_bytes": 5}, retry_after_seconds=retry_after)
    read = error_from_call(failed(sent))
    assert type(read) is errors.ResourceExhaustedError
    assert (str(read), read.reason) == ("no room", Reason.MEMORY_EXHAUSTED)
    assert (read.metadata, read.retry_after_seconds) == ({"requested_bytes": "5"}, retry_after)


@pytest.mark.parametrize("letter", ["x", "é", "漢", "😀"])
def test_long_values_are_shortened_to_the_limit_of_a_trailer(letter: str) -> None:
    """Text is percent-encoded and details may be in base64; past 8 KiB in all gRPC drops the status at random."""
    name = letter * 512
    error = errors.NonFiniteGradientError(f"tensor {name!r} " + name * 8, metadata={"tensor": name, "element": 3})
    status = status_of(error)
    percent_encoded = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.details.encode())
    base64 = -(-len(status.trailing_metadata[0][1]) * 4 // 3)
    assert percent_encoded + base64 < 7_500
    assert error_from_call(failed(error)).metadata["element"] == "3"


@pytest.mark.parametrize(
    "trailers",
    [
        None,
        (),
        (("other", "value"),),
        ((TRAILER, "text where bytes belong"),),
        ((TRAILER, b"\xff\xff garbage"),),
        ((TRAILER, status_pb2.RichStatus(code=14, message="bare").SerializeToString()),),
    ],
)
def test_a_status_without_our_details_is_told_by_its_code(trailers: Any) -> None:
    error = error_from_call(FinishedCall(grpc.StatusCode.UNAVAILABLE, "connection refused", trailers))
    assert type(error) is errors.UnavailableError
    assert str(error) == "connection refused (UNAVAILABLE)"


def test_details_of_another_domain_are_not_ours() -> None:
    status = status_pb2.RichStatus()
    info = status_pb2.ErrorInfo(reason="FENCED", domain="elsewhere.example")
    status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
    call = FinishedCall(grpc.StatusCode.INTERNAL, "proxy", ((TRAILER, status.SerializeToString()),))
    assert type(error_from_call(call)) is errors.ServerError


def test_a_status_without_text_says_so() -> None:
    error = error_from_call(FinishedCall(grpc.StatusCode.CANCELLED, None, ()))
    assert str(error) == "no details (CANCELLED)"


def test_an_error_that_is_no_call_is_a_server_error() -> None:
    error = error_from_call(grpc.RpcError("odd"))
    assert (type(error), str(error)) == (errors.ServerError, "odd (UNKNOWN)")


@pytest.mark.parametrize("retry_after_seconds", [None, 0.25])
def test_an_error_travels_without_a_call(retry_after_seconds: float | None) -> None:
    error = StepMismatchError("x" * 5000, metadata={"step": 3}, retry_after_seconds=retry_after_seconds)
    details = status_pb2.RichStatus.FromString(status_details(error).SerializeToString())
    assert (details.code, details.message) == (grpc.StatusCode.ABORTED.value[0], "x" * 1536)
    read = error_from_details(details)
    assert (type(read), read.metadata, read.retry_after_seconds) == (
        StepMismatchError,
        {"step": "3"},
        retry_after_seconds,
    )


def test_details_of_somebody_else_are_told_by_their_text() -> None:
    read = error_from_details(status_pb2.RichStatus(code=16, message="go away"))
    assert (type(read), str(read)) == (ServerError, "go away (UNKNOWN)")
