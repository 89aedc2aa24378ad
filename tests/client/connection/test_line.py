"""The channel behind a client's calls: opened, closed for a fork, and opened again when it is needed."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire.connection.line import Line
from stepwire.errors import Reason, UnavailableError


class Channel:
    """A channel that notes its end."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def opened() -> list[Channel]:
    return []


@pytest.fixture
def line(opened: list[Channel]) -> Line:
    def open_channel() -> Any:
        opened.append(Channel())
        return opened[-1]

    return Line(open_channel)


def test_a_channel_is_opened_again_when_it_is_needed_after_a_rest(line: Line, opened: list[Channel]) -> None:
    (first,) = opened
    assert line.channel is first
    line.rest()
    line.rest()
    assert (first.closed, len(opened)) == (1, 1)
    second: Any = line.channel
    assert (second is first, opened) == (False, [first, second])


def test_a_line_that_was_closed_opens_no_channel(line: Line, opened: list[Channel]) -> None:
    first: Any = line.channel
    line.close()
    line.close()
    assert first.closed == 1
    with pytest.raises(ValueError, match="the client is closed, and makes no more calls"):
        line.channel  # noqa: B018
    assert opened == [first]


def test_a_call_whose_channel_is_closed_under_it_is_repeated_unless_the_line_is_closed(line: Line) -> None:
    closed, other = ValueError("Cannot invoke RPC on closed channel!"), ValueError("bad shape")
    broken = line.broken(closed)
    assert isinstance(broken, UnavailableError)
    assert (broken.reason, line.broken(other)) == (Reason.UNREACHABLE, other)
    line.close()
    assert line.broken(closed) is closed
