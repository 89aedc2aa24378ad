"""Steps whose outcome stays unknown to the client: applied without a reply, or never sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.errors import DeadlineExceededError
from stepwire.links.hold import Hold
from stepwire.steps.call import StepCall

__all__ = ["lost_replies"]


@contextlib.contextmanager
def lost_replies(*, applied: bool = True, of: Callable[[Hold], bool] = lambda hold: True) -> Iterator[None]:
    """Fail every step in a block, as if the deadline had passed.

    Args:
        applied: the server applies the step before; else the step never arrives.
        of: tells the holds whose steps fail.
    """
    exchange = Hold._exchange

    def lost(self: Hold, stream: Any, call: StepCall, deadline: Any) -> Any:
        if not of(self):
            return exchange(self, stream, call, deadline)
        if applied:
            exchange(self, stream, call, deadline)
        call.sent = True
        raise DeadlineExceededError("the reply was lost")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Hold, "_exchange", lost)
        patched.setattr(Hold, "free_lane", None)  # no step goes another way
        yield
