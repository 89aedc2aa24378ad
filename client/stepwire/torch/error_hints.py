"""What a user of an optimizer can do about errors that speak of connections and slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stepwire.errors import FencedError, StepwireError, UnavailableError
from stepwire.torch.options import RemoteOptions

__all__ = ["advising"]


@contextlib.contextmanager
def advising(options: RemoteOptions, session_id: str | None) -> Iterator[None]:
    """Name the argument that an error is about, and a remedy that an optimizer has.

    Args:
        options: where the server is.
        session_id: of the session in use; None before there is one.

    Raises:
        UnavailableError: the server cannot be reached, or did not answer in time.
        FencedError: another optimizer took the session.
    """
    try:
        yield
    except UnavailableError as error:
        remedy = "is it running (stepwire serve), and is it the right one?"
        if session_id is not None:
            remedy = "try again once it is there: a step that had arrived is not taken twice"
        raise _in_other_words(error, f"server={_name(options)}: {error}; {remedy}") from error
    except FencedError as error:
        raise _in_other_words(
            error,
            f"another optimizer took the session ({error}); only one may step it. To take it back, make this optimizer "
            f"again with session={session_id!r}, which pulls its parameters",
        ) from error


def _in_other_words(error: StepwireError, message: str) -> StepwireError:
    return type(error)(
        message, reason=error.reason, metadata=error.metadata, retry_after_seconds=error.retry_after_seconds
    )


def _name(options: RemoteOptions) -> str:
    target = getattr(options.server, "target", options.server)
    return repr(target)
