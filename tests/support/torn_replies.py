"""Replies that break off after some chunks, from a server that cannot be reached for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire.errors import DeadlineExceededError
from stepwire.links.hold import Hold
from stepwire.steps.reply import ReplyReader

__all__ = ["torn_replies"]


@contextlib.contextmanager
def torn_replies(*, chunks: int = 1, unreachable: bool = True) -> Iterator[None]:
    """Break off every reply in a block.

    Args:
        chunks: the chunks of a reply that arrive.
        unreachable: no stream can be opened in the block; the open one serves until its reply breaks off.
    """
    read, attach, arrived = ReplyReader.read, Hold.attach, 0

    def torn(self: ReplyReader, frame: Any) -> None:
        nonlocal arrived
        if arrived == chunks:
            raise DeadlineExceededError("the reply broke off")
        read(self, frame)
        arrived += frame.message.HasField("chunk")

    def refused(self: Hold, deadline: Any) -> Any:
        if unreachable and not self.attached:
            raise DeadlineExceededError("the server cannot be reached")
        return attach(self, deadline)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ReplyReader, "read", torn)
        patched.setattr(Hold, "attach", refused)
        yield
