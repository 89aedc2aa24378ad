"""Looking into a server in this process, so that a test waits for what happened instead of for time to pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.integration.events import Happenings

from stepwire_server.registry import Registry
from stepwire_server.session import Session
from stepwire_server.slot import Attachment

__all__ = ["chunks_staged", "stream_ends"]


def stream_ends(registry: Registry) -> Happenings:
    """Tell of each attached stream that has ended, after the server has let go of all that it held."""
    ends, stream = Happenings(), registry.stream

    @contextlib.contextmanager
    def told(cancel: Callable[[], object]) -> Iterator[Attachment]:
        try:
            with stream(cancel) as attachment:
                yield attachment
        finally:
            ends.note()

    registry.stream = told  # type: ignore[method-assign]
    return ends


def chunks_staged(session: Session) -> Happenings:
    """Tell of each chunk of gradient that a step of the session has taken in; what its stream does next is wait."""
    staged, begin = Happenings(), session.begin

    def observed(*arguments: Any) -> Any:
        staging = begin(*arguments)
        if staging is not None:
            add = staging.add

            def added(*chunk: Any) -> None:
                add(*chunk)
                staged.note()

            staging.add = added  # type: ignore[method-assign]
        return staging

    session.begin = observed  # type: ignore[method-assign]
    return staged
