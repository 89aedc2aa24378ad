"""Errors on the wire: a google.rpc.Status in gRPC's trailers, which the server writes and the client reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Final, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from stepwire.errors import ERROR_DOMAIN, ERROR_TABLE, StepwireError, error_from_code, error_from_reason
from stepwire.v1 import status_pb2

__all__ = ["RichStatus", "error_from_call", "error_from_details", "status_details", "status_of"]

_TRAILER: Final = "grpc-status-details-bin"
_TYPE_PREFIX: Final = "type.googleapis.com/google.rpc."
# gRPC drops a status with trailers of more than 8 KiB. The trailers have the text percent-encoded, and the details with
# the text again, in base64 at worst. The limit leaves space for the longest name of a tensor in the metadata: 512
# characters of four bytes.
_MAX_TEXT_BYTES: Final = 1536


class RichStatus(NamedTuple):
    """The argument of `ServicerContext.abort_with_status`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def status_of(error: StepwireError) -> RichStatus:
    """Return the status of an error, by the table."""
    status = status_details(error)
    code = grpc.StatusCode[ERROR_TABLE[error.reason].code]
    return RichStatus(code, status.message, ((_TRAILER, status.SerializeToString()),))


def status_details(error: StepwireError) -> status_pb2.RichStatus:
    """Return the message of an error's status, for a connection without a gRPC call."""
    code = grpc.StatusCode[ERROR_TABLE[error.reason].code]
    status = status_pb2.RichStatus(code=code.value[0], message=_fitting(str(error)))
    info = status_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    status.details.append(AnyMessage(type_url=_TYPE_PREFIX + "ErrorInfo", value=info.SerializeToString()))
    if error.retry_after_seconds is not None:
        retry = status_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.append(AnyMessage(type_url=_TYPE_PREFIX + "RetryInfo", value=retry.SerializeToString()))
    return status


def error_from_call(call: grpc.RpcError) -> StepwireError:
    """Return the error of a call that failed; the code alone decides for a status without stepwire's details.

    gRPC raises the call itself, and whoever has the call has the error. So its trace is cut off here: the trace refers
    to every caller's frame, and with them to gradients and to memory that is shared, until the collector runs.
    """
    call.__traceback__ = None
    if not isinstance(call, grpc.Call):
        return error_from_code("UNKNOWN", str(call))
    details = call.details() or "no details"
    info, retry_after = _read_trailer(call.trailing_metadata() or ())
    if info is None:
        return error_from_code(call.code().name, details)
    return error_from_reason(info.reason, details, dict(info.metadata), retry_after)


def error_from_details(status: status_pb2.RichStatus) -> StepwireError:
    """Return the error of a message that `status_details` wrote.

    Raises:
        DecodeError: the message contains other details.
    """
    info, retry_after = _read_details(status)
    if info is None:
        return error_from_code("UNKNOWN", status.message)
    return error_from_reason(info.reason, status.message, dict(info.metadata), retry_after)


def _fitting(text: str) -> str:
    """Shorten a text to the limit of a trailer."""
    sizes = accumulate(1 if " " <= letter <= "~" and letter != "%" else 3 * len(letter.encode()) for letter in text)
    return text[: bisect_right(list(sizes), _MAX_TEXT_BYTES)]


def _read_trailer(
    metadata: Iterable[tuple[str, str | bytes]],
) -> tuple[status_pb2.ErrorInfo | None, float | None]:
    read: tuple[status_pb2.ErrorInfo | None, float | None] = (None, None)
    for key, value in metadata:
        if key != _TRAILER or not isinstance(value, bytes):
            continue
        try:
            read = _read_details(status_pb2.RichStatus.FromString(value))
        except DecodeError:
            return None, None
    return read


def _read_details(status: status_pb2.RichStatus) -> tuple[status_pb2.ErrorInfo | None, float | None]:
    info: status_pb2.ErrorInfo | None = None
    retry_after: float | None = None
    for detail in status.details:
        if detail.type_url == _TYPE_PREFIX + "ErrorInfo":
            info = status_pb2.ErrorInfo.FromString(detail.value)
        elif detail.type_url == _TYPE_PREFIX + "RetryInfo":
            delay = status_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after = delay.ToNanoseconds() / 1e9
    return (info, retry_after) if info is not None and info.domain == ERROR_DOMAIN else (None, None)
