"""The table of causes, statuses and exception classes; `tests/guards/test_errors.py` proves that it is total."""

from __future__ import annotations

import pytest

from stepwire import errors
from stepwire.errors import Reason

BARE_CODES = {
    "CANCELLED": (errors.UnavailableError, Reason.UNREACHABLE),
    "UNKNOWN": (errors.ServerError, Reason.INTERNAL),
    "INVALID_ARGUMENT": (errors.InvalidRequestError, Reason.INVALID_FRAME),
    "DEADLINE_EXCEEDED": (errors.DeadlineExceededError, Reason.DEADLINE_EXCEEDED),
    "UNIMPLEMENTED": (errors.UnsupportedFeatureError, Reason.UNSUPPORTED_FEATURE),
    "RESOURCE_EXHAUSTED": (errors.ResourceExhaustedError, Reason.TOO_MANY_STREAMS),
    "UNAVAILABLE": (errors.UnavailableError, Reason.UNREACHABLE),
    "UNAUTHENTICATED": (errors.AuthenticationError, Reason.UNAUTHENTICATED),
    "PERMISSION_DENIED": (errors.PermissionDeniedError, Reason.PERMISSION_DENIED),
    "INTERNAL": (errors.ServerError, Reason.INTERNAL),
    "DATA_LOSS": (errors.ServerError, Reason.INTERNAL),
}


def test_an_error_keeps_its_values_as_strings() -> None:
    error = errors.StepMismatchError("gap", metadata={"expected_step": 8, "actual_step": 10}, retry_after_seconds=0.5)
    assert str(error) == "gap"
    assert error.reason is Reason.STEP_MISMATCH
    assert error.metadata == {"expected_step": "8", "actual_step": "10"}
    assert error.retry_after_seconds == 0.5


def test_an_error_without_values_has_none() -> None:
    error = errors.FencedError("taken")
    assert (error.metadata, error.retry_after_seconds, error.reason) == ({}, None, Reason.FENCED)


def test_one_base_class_catches_everything_and_nothing_else() -> None:
    assert errors.StepwireError.__mro__[1:] == (Exception, BaseException, object)
    assert all(issubclass(row.exception, errors.StepwireError) for row in errors.ERROR_TABLE.values())


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (errors.NonFiniteGradientError, errors.InvalidRequestError),
        (errors.DeadlineExceededError, errors.UnavailableError),
    ],
)
def test_the_drawn_tree_is_the_real_one(child: type[Exception], parent: type[Exception]) -> None:
    assert child.__bases__ == (parent,)


def test_only_passing_troubles_are_retried() -> None:
    retried = {reason for reason, row in errors.ERROR_TABLE.items() if row.retryable}
    passing = {
        Reason.STATE_CHANGED,
        Reason.SHUTTING_DOWN,
        Reason.STREAM_DISPLACED,
        Reason.UNREACHABLE,
        Reason.NO_STANDBY,
        Reason.SESSION_MOVING,
    }
    assert retried == passing


def test_a_reason_becomes_its_class_with_all_values() -> None:
    error = errors.error_from_reason("TOO_MANY_SESSIONS", "full", {"max_sessions": "3"}, 2.0)
    assert type(error) is errors.ResourceExhaustedError
    assert (error.reason, str(error)) == (Reason.TOO_MANY_SESSIONS, "full")
    assert (error.metadata, error.retry_after_seconds) == ({"max_sessions": "3"}, 2.0)


def test_a_reason_of_a_newer_server_is_told_by_its_name() -> None:
    error = errors.error_from_reason("MOON_PHASE", "wrong moon", {"phase": "new"})
    assert type(error) is errors.ServerError
    assert str(error) == "wrong moon (unknown reason 'MOON_PHASE')"
    assert (error.reason, error.metadata) == (Reason.INTERNAL, {"phase": "new"})


@pytest.mark.parametrize(("code", "expected"), BARE_CODES.items())
def test_a_bare_status_becomes_a_class(code: str, expected: tuple[type[Exception], Reason]) -> None:
    error = errors.error_from_code(code, "no details")
    assert (type(error), error.reason) == expected
    assert str(error) == f"no details ({code})"
