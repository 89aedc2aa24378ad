"""Looking into a server in this process, so that a test waits for what happened instead of for time to pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.session import Session
from tests.integration.events import Happenings
from tests.support.raw import RawClient, step_message

__all__ = ["chunks_staged", "half_applied", "steps_over", "stream_ends"]


def stream_ends(registry: Registry) -> Happenings:
    """Tell of each attached stream that has ended, after the server has let go of all that it held."""
    ends, stream = Happenings(), registry.streams.stream

    @contextlib.contextmanager
    def told(cancel: Callable[[], object]) -> Iterator[ClientStream]:
        try:
            with stream(cancel) as attached:
                yield attached
        finally:
            ends.note()

    registry.streams.stream = told  # type: ignore[method-assign]
    return ends


def chunks_staged(session: Session) -> Happenings:
    """Tell of each chunk of gradient that a step of the session has taken in; what its stream does next is wait."""
    return _observe_steps(session, "add")


def steps_over(session: Session) -> Happenings:
    """Tell of each step on a stream of the session that is over for the server, answer and all."""
    return _observe_steps(session, "close")


def half_applied(registry: Registry, raw: RawClient, session_id: str) -> int:
    """Leave the next step of a session half applied: its client is gone. Return the number of the step."""
    ended = stream_ends(registry)
    stream, served = raw.attach(session_id), registry.get(session_id)
    opened = stream.receive()
    assert opened is not None
    number = opened.opened.applied_step + 1
    message = step_message(number, np.ones(16, np.float32), commit=False)
    message.begin.overlap = True
    stream.send(message)
    stream.receive()
    stream.cancel()
    ended.wait()
    assert served.unfinished_step == number
    return number


def _observe_steps(session: Session, name: str) -> Happenings:
    happenings, begin = Happenings(), session.begin

    def observed(*arguments: Any) -> Any:
        step = begin(*arguments)
        gradient = step.gradient
        original = getattr(gradient, name)

        def told(*values: Any) -> None:
            original(*values)
            happenings.note()

        setattr(gradient, name, told)
        return step

    session.begin = observed  # type: ignore[method-assign]
    return happenings
