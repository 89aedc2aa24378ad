"""Clients with an attached stream of their own, and the messages of a step."""

from __future__ import annotations

from typing import Any

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2

COMMIT = pb.AttachRequest(commit=step_pb2.StepCommit())


class Attached:
    """A client with an attached stream of its own.

    Attributes:
        live: the session.
        stream: the stream.
        opened: the server's first message.
        token: the token of this attach.
    """

    def __init__(self, live: Any, token: int, **fields: Any) -> None:
        self.live = live
        self.stream = live.wire.open()
        self.stream.send(live.opening(attach_token=token, **fields))
        self.opened = self.receive().opened
        self.token = self.opened.attach_token

    def receive(self) -> pb.AttachResponse:
        return pb.AttachResponse.FromString(self.stream.receive())

    def step(self, step: int, seed: int | None = None, **fields: Any) -> pb.AttachResponse:
        """Apply a step in one message; `fields` are those of its `begin`."""
        gradient = self.live.gradient(step if seed is None else seed)
        begin = step_pb2.StepBegin(step=step, **fields)
        self.stream.send(self.live.frame(begin=begin, commit=True, payload=gradient))
        return self.receive()


def step_messages(live: Any, begin: step_pb2.StepBegin, elements: int = 16_000) -> list[pb.AttachRequest]:
    """Make the messages of a whole step; the last one is its commit."""
    ranges = [(offset, min(elements, live.size - offset)) for offset in range(0, live.size, elements)]
    gradient = live.gradient(begin.step)
    messages = [live.frame(offset, count, payload=gradient[offset : offset + count]) for offset, count in ranges]
    return [pb.AttachRequest(begin=begin), *messages, COMMIT]
