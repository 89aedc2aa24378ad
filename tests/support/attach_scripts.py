"""Attached streams that play a script, and keep what they were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
import numpy as np

from stepwire.errors import StepwireError
from stepwire.v1 import attach_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.error_details import status_of

__all__ = ["Script", "Server", "answer", "lose_the_answer", "opened", "refuse", "serve_steps"]

Script = Callable[[Iterator[pb.AttachRequest]], Iterator[pb.AttachResponse]]


def opened(applied_step: int, *, token: int = 7, load: int = 1) -> pb.AttachResponse:
    return pb.AttachResponse(
        opened=attach_pb2.AttachOpened(attach_token=token, epoch=1, applied_step=applied_step, applied_load=load)
    )


def answer(step: int, elements: int = 5) -> pb.AttachResponse:
    return pb.AttachResponse(
        chunk=tensor_pb2.Chunk(offset=0, count=elements),
        payload=np.full(elements, step, np.float32).tobytes(),
        result=step_pb2.StepResult(step=step),
    )


class Server:
    """Plays one script a stream, in turn, and keeps what it was sent."""

    def __init__(self, scripted: Any, *scripts: Script) -> None:
        self.received: list[list[pb.AttachRequest]] = []
        self._scripts = list(scripts)
        scripted.on("Attach", self._attach)

    def _attach(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        received: list[pb.AttachRequest] = []
        self.received.append(received)

        def requests() -> Iterator[pb.AttachRequest]:
            for data in messages:
                received.append(pb.AttachRequest.FromString(data))
                yield received[-1]

        try:
            for response in self._scripts.pop(0)(requests()):
                yield response.SerializeToString()
        except StepwireError as error:
            refuse(context, error)


def refuse(context: grpc.ServicerContext, error: StepwireError) -> NoReturn:
    """End a call with an error, as a server does."""
    context.abort_with_status(status_of(error))


def serve_steps(applied_step: int, *, load: int = 1) -> Script:
    """Answer every commit."""

    def script(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        yield opened(applied_step, load=load)
        step = 0
        for request in requests:
            step = request.begin.step or step
            if request.HasField("commit"):
                yield answer(step)

    return script


def lose_the_answer(applied_step: int) -> Script:
    """Take one step and end the stream without a word."""

    def script(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        yield opened(applied_step)
        for request in requests:
            if request.HasField("commit"):
                return

    return script
