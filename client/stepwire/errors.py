"""The errors that stepwire raises, and the table that carries them over the wire.

    StepwireError
    ├── InvalidRequestError          INVALID_ARGUMENT
    │   └── NonFiniteGradientError   INVALID_ARGUMENT
    ├── SessionNotFoundError         NOT_FOUND
    ├── StepMismatchError            ABORTED
    │   └── StateLossError           ABORTED
    ├── StateChangedError            ABORTED
    ├── NotEnoughWorkersError        ABORTED
    ├── FencedError                  FAILED_PRECONDITION
    ├── SessionMovedError            FAILED_PRECONDITION
    ├── UnsupportedFeatureError      FAILED_PRECONDITION
    ├── SessionNotReadyError         FAILED_PRECONDITION
    ├── ResourceExhaustedError       RESOURCE_EXHAUSTED
    ├── UnavailableError             UNAVAILABLE
    │   └── DeadlineExceededError    DEADLINE_EXCEEDED
    ├── AuthenticationError          UNAUTHENTICATED
    ├── PermissionDeniedError        PERMISSION_DENIED
    ├── DataLossError                DATA_LOSS
    └── ServerError                  INTERNAL

The server raises these same classes. One interceptor writes `(code, reason, metadata)` into the status. The client
reads the reason back into the class. Programs match the class or `reason`, never the text.

The contract has the same table for every language: the enum `Reason` in `reason.proto`, with the causes, the codes and
the remedies. A test holds this one to it. The table is repeated here, since the errors load no protobuf.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "ERROR_DOMAIN",
    "ERROR_TABLE",
    "AuthenticationError",
    "DataLossError",
    "DeadlineExceededError",
    "ErrorRow",
    "FencedError",
    "InvalidRequestError",
    "NonFiniteGradientError",
    "NotEnoughWorkersError",
    "PermissionDeniedError",
    "Reason",
    "ResourceExhaustedError",
    "ServerError",
    "SessionMovedError",
    "SessionNotFoundError",
    "SessionNotReadyError",
    "StateChangedError",
    "StateLossError",
    "StepMismatchError",
    "StepwireError",
    "UnavailableError",
    "UnsupportedFeatureError",
    "error_from_code",
    "error_from_reason",
]

ERROR_DOMAIN = "stepwire"


class Reason(enum.StrEnum):
    """The cause of an error for programs: `ErrorInfo.reason` on the wire, and `Reason` in the contract."""

    INVALID_TENSOR = "INVALID_TENSOR"
    INVALID_CONFIG = "INVALID_CONFIG"
    INVALID_FRAME = "INVALID_FRAME"
    NON_FINITE_GRADIENT = "NON_FINITE_GRADIENT"
    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    STEP_MISMATCH = "STEP_MISMATCH"
    STEP_SUPERSEDED = "STEP_SUPERSEDED"
    STATE_CHANGED = "STATE_CHANGED"
    NOT_ENOUGH_WORKERS = "NOT_ENOUGH_WORKERS"
    STEP_UNFINISHED = "STEP_UNFINISHED"
    STALE_EPOCH = "STALE_EPOCH"
    FENCED = "FENCED"
    NOT_PRIMARY = "NOT_PRIMARY"
    UNSUPPORTED_FEATURE = "UNSUPPORTED_FEATURE"
    SESSION_NOT_READY = "SESSION_NOT_READY"
    MEMORY_EXHAUSTED = "MEMORY_EXHAUSTED"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TOO_MANY_STEPS = "TOO_MANY_STEPS"
    TABLE_FULL = "TABLE_FULL"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    STREAM_DISPLACED = "STREAM_DISPLACED"
    NO_STANDBY = "NO_STANDBY"
    SESSION_MOVED = "SESSION_MOVED"
    SESSION_MOVING = "SESSION_MOVING"
    UNREACHABLE = "UNREACHABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    SESSION_DAMAGED = "SESSION_DAMAGED"
    DEVICE_LOST = "DEVICE_LOST"
    DURABLE_STEP_LOST = "DURABLE_STEP_LOST"
    STATE_LOST = "STATE_LOST"
    CHECKPOINT_DAMAGED = "CHECKPOINT_DAMAGED"
    DURABILITY_FAILED = "DURABILITY_FAILED"
    LOG_DAMAGED = "LOG_DAMAGED"
    INTERNAL = "INTERNAL"


class StepwireError(Exception):
    """The base of every error that stepwire raises.

    Attributes:
        reason: the cause, for programs.
        metadata: the values involved (`field`, `tensor`, `expected_step`, …), all strings.
        retry_after_seconds: the time after which a retry may succeed. None when a retry will not help or the server
            cannot tell.
    """

    default_reason = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        metadata: Mapping[str, object] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        """Keep the message and its values.

        Args:
            message: the cause with its values, and the next action.
            reason: the cause for programs; the class's own by default.
            metadata: the values involved.
            retry_after_seconds: the time after which a retry may succeed.
        """
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(StepwireError):
    """The request is malformed; `metadata["field"]` names the field. Sending the request again will not help."""

    default_reason = Reason.INVALID_CONFIG

    @classmethod
    def of(
        cls, field: str, problem: str, *, reason: Reason = Reason.INVALID_CONFIG, **metadata: object
    ) -> InvalidRequestError:
        """Return the error of one field.

        Args:
            field: the path of the field, such as `"groups[1].lr"`. The message starts with the path.
            problem: the rest of the message: the value and the next action.
            reason: the cause, for programs.
            metadata: further values.

        Returns:
            The error, with the field in its metadata.
        """
        return cls(f"{field}: {problem}", reason=reason, metadata={"field": field, **metadata})


class NonFiniteGradientError(InvalidRequestError):
    """A gradient contains NaN or Inf; `metadata["tensor"]` names the first one. Nothing was applied."""

    default_reason = Reason.NON_FINITE_GRADIENT


class SessionNotFoundError(StepwireError):
    """There is no such session: never created, closed, expired, or lost with its server. The session will not return.

    A client adds `metadata["last_known_step"]`, the last step that it knows to be applied.
    """

    default_reason = Reason.SESSION_NOT_FOUND


class StepMismatchError(StepwireError):
    """The step is neither the next one nor a replay of the last; see `expected_step`, `actual_step`."""

    default_reason = Reason.STEP_MISMATCH


class StateLossError(StepMismatchError):
    """The server was restarted, and has lost the last steps, as the session's durability allows.

    The session goes on from `durable_step`: its parameters are those of that step. `pull` fetches them.
    """

    default_reason = Reason.STATE_LOST

    @property
    def durable_step(self) -> int:
        """The last step that the server has."""
        return int(self.metadata.get("durable_step", 0))

    @property
    def applied_step(self) -> int:
        """The last step that the server had acknowledged."""
        return int(self.metadata.get("applied_step", 0))

    @property
    def lost_load(self) -> bool:
        """A load is lost as well."""
        return self.metadata.get("lost_load") == "True"

    def through(self, step: int) -> StateLossError:
        """Return the error of a loss of all steps up to one, of which the server had some again in between."""
        return StateLossError(
            f"{self}; with those that were to be sent again, steps {self.durable_step + 1} to {step} are lost",
            metadata={**self.metadata, "applied_step": step},
        )


class StateChangedError(StepwireError):
    """The state changed during the read; read the state again."""

    default_reason = Reason.STATE_CHANGED


class NotEnoughWorkersError(StepwireError):
    """Too few workers contributed to a round within its time. Nothing was applied; the same gradient may be sent again.

    `metadata["missing_workers"]` has the indices of the others, joined by commas.
    """

    default_reason = Reason.NOT_ENOUGH_WORKERS


class FencedError(StepwireError):
    """Another client attached as this worker, the session lives in a newer epoch, or another server owns its data."""

    default_reason = Reason.FENCED


class SessionMovedError(StepwireError):
    """The session lives on in sessions of other servers: `stepwire.move_session`, or `stepwire cluster scale`.

    The calls of a `Session` follow by themselves, as `Client.session` does with a former id.
    """

    default_reason = Reason.SESSION_MOVED


class UnsupportedFeatureError(StepwireError):
    """This server does not have an option of the session; `metadata["field"]` names the option."""

    default_reason = Reason.UNSUPPORTED_FEATURE


class SessionNotReadyError(StepwireError):
    """The session's parameters have not been loaded yet, or a step was interrupted half applied."""

    default_reason = Reason.SESSION_NOT_READY


class ResourceExhaustedError(StepwireError):
    """Memory, session count or stream count is used up on the server."""

    default_reason = Reason.MEMORY_EXHAUSTED


class UnavailableError(StepwireError):
    """The server cannot be reached or is going away, and the retries within the deadline failed."""

    default_reason = Reason.UNREACHABLE


class DeadlineExceededError(UnavailableError):
    """The call's deadline passed. The step may or may not have been applied; retry the step by its number."""

    default_reason = Reason.DEADLINE_EXCEEDED


class AuthenticationError(StepwireError):
    """The server needs a token, or another token."""

    default_reason = Reason.UNAUTHENTICATED


class PermissionDeniedError(StepwireError):
    """The token is valid and does not allow the request."""

    default_reason = Reason.PERMISSION_DENIED


class DataLossError(StepwireError):
    """Stored or in-memory state failed its check and must not be used, or can no longer be made durable."""

    default_reason = Reason.SESSION_DAMAGED


class ServerError(StepwireError):
    """A bug in the server. The message carries an id; the server's log has the text."""

    default_reason = Reason.INTERNAL


class ErrorRow(NamedTuple):
    """One row of the table.

    Attributes:
        code: the name of the gRPC status code that carries the reason.
        exception: the class that the client raises.
        retryable: True if the client repeats the request by itself.
    """

    code: str
    exception: type[StepwireError]
    retryable: bool = False


# `retryable` is for errors without RetryInfo. RetryInfo always permits a retry.
ERROR_TABLE: dict[Reason, ErrorRow] = {
    Reason.INVALID_TENSOR: ErrorRow("INVALID_ARGUMENT", InvalidRequestError),
    Reason.INVALID_CONFIG: ErrorRow("INVALID_ARGUMENT", InvalidRequestError),
    Reason.INVALID_FRAME: ErrorRow("INVALID_ARGUMENT", InvalidRequestError),
    Reason.NON_FINITE_GRADIENT: ErrorRow("INVALID_ARGUMENT", NonFiniteGradientError),
    Reason.SESSION_NOT_FOUND: ErrorRow("NOT_FOUND", SessionNotFoundError),
    Reason.STEP_MISMATCH: ErrorRow("ABORTED", StepMismatchError),
    Reason.STEP_SUPERSEDED: ErrorRow("ABORTED", StepMismatchError),
    Reason.STATE_LOST: ErrorRow("ABORTED", StateLossError),
    Reason.STATE_CHANGED: ErrorRow("ABORTED", StateChangedError, retryable=True),
    Reason.NOT_ENOUGH_WORKERS: ErrorRow("ABORTED", NotEnoughWorkersError),
    Reason.STEP_UNFINISHED: ErrorRow("FAILED_PRECONDITION", SessionNotReadyError),
    Reason.STALE_EPOCH: ErrorRow("FAILED_PRECONDITION", FencedError),
    Reason.FENCED: ErrorRow("FAILED_PRECONDITION", FencedError),
    Reason.NOT_PRIMARY: ErrorRow("FAILED_PRECONDITION", FencedError),
    Reason.UNSUPPORTED_FEATURE: ErrorRow("FAILED_PRECONDITION", UnsupportedFeatureError),
    Reason.SESSION_NOT_READY: ErrorRow("FAILED_PRECONDITION", SessionNotReadyError),
    Reason.MEMORY_EXHAUSTED: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.TOO_MANY_SESSIONS: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.TOO_MANY_STREAMS: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.TOO_MANY_CALLS: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.TOO_MANY_STEPS: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.TABLE_FULL: ErrorRow("RESOURCE_EXHAUSTED", ResourceExhaustedError),
    Reason.SHUTTING_DOWN: ErrorRow("UNAVAILABLE", UnavailableError, retryable=True),
    Reason.STREAM_DISPLACED: ErrorRow("UNAVAILABLE", UnavailableError, retryable=True),
    Reason.NO_STANDBY: ErrorRow("UNAVAILABLE", UnavailableError, retryable=True),
    Reason.SESSION_MOVED: ErrorRow("FAILED_PRECONDITION", SessionMovedError),
    Reason.SESSION_MOVING: ErrorRow("UNAVAILABLE", UnavailableError, retryable=True),
    Reason.UNREACHABLE: ErrorRow("UNAVAILABLE", UnavailableError, retryable=True),
    Reason.DEADLINE_EXCEEDED: ErrorRow("DEADLINE_EXCEEDED", DeadlineExceededError),
    Reason.UNAUTHENTICATED: ErrorRow("UNAUTHENTICATED", AuthenticationError),
    Reason.PERMISSION_DENIED: ErrorRow("PERMISSION_DENIED", PermissionDeniedError),
    Reason.SESSION_DAMAGED: ErrorRow("DATA_LOSS", DataLossError),
    Reason.DEVICE_LOST: ErrorRow("DATA_LOSS", DataLossError),
    Reason.DURABLE_STEP_LOST: ErrorRow("DATA_LOSS", DataLossError),
    Reason.CHECKPOINT_DAMAGED: ErrorRow("DATA_LOSS", DataLossError),
    Reason.DURABILITY_FAILED: ErrorRow("DATA_LOSS", DataLossError),
    Reason.LOG_DAMAGED: ErrorRow("DATA_LOSS", DataLossError),
    Reason.INTERNAL: ErrorRow("INTERNAL", ServerError),
}

# The reasons of statuses without ErrorInfo: from gRPC itself, a proxy, or a server that died.
_REASON_OF_BARE_CODE: dict[str, Reason] = {
    "CANCELLED": Reason.UNREACHABLE,
    "UNAVAILABLE": Reason.UNREACHABLE,
    "DEADLINE_EXCEEDED": Reason.DEADLINE_EXCEEDED,
    "RESOURCE_EXHAUSTED": Reason.TOO_MANY_STREAMS,
    "INVALID_ARGUMENT": Reason.INVALID_FRAME,
    "UNIMPLEMENTED": Reason.UNSUPPORTED_FEATURE,
    "UNAUTHENTICATED": Reason.UNAUTHENTICATED,
    "PERMISSION_DENIED": Reason.PERMISSION_DENIED,
}


def error_from_reason(
    reason: str,
    message: str,
    metadata: Mapping[str, str],
    retry_after_seconds: float | None = None,
) -> StepwireError:
    """Return the exception that the table names for a reason; a `ServerError` for a reason of a newer server.

    Args:
        reason: the reason's name on the wire.
        message: the text of the error.
        metadata: the values involved.
        retry_after_seconds: the time after which a retry may succeed.
    """
    try:
        known = Reason(reason)
    except ValueError:
        return ServerError(f"{message} (unknown reason {reason!r})", metadata=metadata)
    return ERROR_TABLE[known].exception(
        message, reason=known, metadata=metadata, retry_after_seconds=retry_after_seconds
    )


def error_from_code(code: str, message: str) -> StepwireError:
    """Return the exception of a bare gRPC status name such as "UNAVAILABLE"."""
    return error_from_reason(_REASON_OF_BARE_CODE.get(code, Reason.INTERNAL), f"{message} ({code})", {})
