"""Clients of one server, in a process of their own, each in a closed loop: the next step follows the reply.

`python fairness_child.py TARGET SIZE COUNT` attaches so many sessions of so many parameters and prints "ready". For
each line with a number of seconds it steps all of them for so long. Then it prints a JSON object: `counts`, the steps
of each session, and `seconds`, the time of each step.

The messages are made by hand, and one thread serves all streams. A thread for each session would measure the
interpreter's lock of the clients.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import grpc
import numpy as np

import stepwire
from stepwire.v1 import attach_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.channel_options import BULK_OPTIONS
from stepwire.wire.frames import read_frame, whole_message

__all__ = ["Stepper"]

_METHOD: Final = "/stepwire.v1.OptimizerService/Attach"
_CHUNK_ELEMENTS: Final = 1 << 20


class Stepper:
    """One attached session."""

    def __init__(self, channel: grpc.aio.Channel, session_id: str, size: int) -> None:
        """Prepare to attach a session of `size` parameters."""
        self._call: Any = channel.stream_stream(_METHOD)()
        self._session_id = session_id
        self._gradient = np.full(size, 0.01, np.float32)
        self._number = 0

    async def attach(self) -> None:
        """Attach to the session."""
        opening = attach_pb2.AttachOpen(session_id=self._session_id)
        await self._call.write(pb.AttachRequest(open=opening).SerializeToString())
        await self._call.read()

    async def step(self) -> None:
        """Send one step, and read its reply to the end."""
        self._number += 1
        sending = asyncio.ensure_future(self._send(self._number))
        while not (reply := read_frame(pb.AttachResponse, await self._read())).message.HasField("result"):
            pass
        await sending
        if reply.message.result.step != self._number:
            raise RuntimeError(f"step {self._number} was answered as {reply.message.result.step}")

    async def _read(self) -> bytes:
        reply = await self._call.read()
        if reply is grpc.aio.EOF:
            raise RuntimeError(f"the stream ended: {await self._call.details()}")
        return bytes(reply)

    async def _send(self, number: int) -> None:
        size = len(self._gradient)
        for low in range(0, size, _CHUNK_ELEMENTS):
            high = min(low + _CHUNK_ELEMENTS, size)
            message = pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=low, count=high - low))
            if low == 0:
                message.begin.CopyFrom(step_pb2.StepBegin(step=number))
            if high == size:
                message.commit.SetInParent()
            await self._call.write(whole_message(message, self._gradient[low:high]))

    def cancel(self) -> None:
        """End the stream."""
        self._call.cancel()


async def _steps_until(stepper: Stepper, end: float) -> list[float]:
    """Return the times of the first step and of those that end before a moment, in seconds."""
    seconds: list[float] = []
    while True:
        began = time.perf_counter()
        await stepper.step()
        if (now := time.perf_counter()) > end and seconds:
            return seconds
        seconds.append(now - began)


async def _serve(target: str, size: int, session_ids: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    unbounded = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(target, options=[*BULK_OPTIONS, *unbounded]) as channel:
        steppers = [Stepper(channel, session_id, size) for session_id in session_ids]
        await asyncio.gather(*(stepper.attach() for stepper in steppers))
        await asyncio.gather(*(stepper.step() for stepper in steppers))
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            end = time.perf_counter() + float(line)
            found = await asyncio.gather(*(_steps_until(stepper, end) for stepper in steppers))
            counts, seconds = [len(each) for each in found], [one for each in found for one in each]
            print(json.dumps({"counts": counts, "seconds": seconds}), flush=True)
        for stepper in steppers:
            stepper.cancel()


def main() -> None:
    """Make sessions, and step them when told to."""
    target, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with stepwire.connect(target, transport="tcp", timeout=120.0) as client:
        tensors = {"w": np.zeros(size, np.float32)}
        session_ids = []
        for _ in range(count):
            session = client.create_session(tensors)
            session_ids.append(session.session_id)
            session.detach()
        asyncio.run(_serve(target, size, session_ids))


if __name__ == "__main__":
    main()
