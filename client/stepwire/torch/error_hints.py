"""Hints for errors about connections and workers, in the terms of an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stepwire.connection.config_file import asked_target, read_config_file
from stepwire.errors import FencedError, SessionNotFoundError, StepwireError, UnavailableError
from stepwire.session import Session
from stepwire.torch.options import RemoteOptions

__all__ = ["with_hints"]


@contextlib.contextmanager
def with_hints(options: RemoteOptions, session: Session | None) -> Iterator[None]:
    """Add the optimizer's argument and a remedy to errors of the block.

    Args:
        options: the options of the optimizer.
        session: the session in use; None before there is a session.

    Raises:
        SessionNotFoundError: the session is lost.
        UnavailableError: the server cannot be reached, or did not reply in time.
        FencedError: another optimizer attached to the session.
    """
    try:
        yield
    except UnavailableError as error:
        remedy = "is it running (stepwire serve), and is it the right one?"
        if session is not None:
            remedy = "try again once the server is there: a step that had arrived is not applied twice"
        raise _with_message(error, f"server={_name(options)}: {error}; {remedy}") from error
    except SessionNotFoundError as error:
        if session is None:
            raise
        raise _with_message(
            error,
            f"{error}. Load a checkpoint into the model and into this optimizer: load_state_dict makes a new session",
        ) from error
    except FencedError as error:
        if options.job is not None:
            raise _with_message(
                error,
                f"another process has joined as this worker ({error}); this one is out. Give each process its own "
                "worker=, or make this optimizer again to be the worker once more",
            ) from error
        session_id = None if session is None else session.session_id  # which keeps the session: the user is told the id
        raise _with_message(
            error,
            f"another optimizer attached to the session ({error}); only one may step it. To attach again, make this "
            f"optimizer again with session={session_id!r}, which pulls the session's parameters",
        ) from error


def _with_message(error: StepwireError, message: str) -> StepwireError:
    made = type(error)(
        message, reason=error.reason, metadata=error.metadata, retry_after_seconds=error.retry_after_seconds
    )
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made


def _name(options: RemoteOptions) -> str:
    server = asked_target(None, read_config_file()) if options.server is None else options.server
    return repr(getattr(server, "target", server))
