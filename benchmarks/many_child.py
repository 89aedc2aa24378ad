"""Clients in one process, each with a connection of its own, in closed loops; an error is counted and ends its client.

`python many_child.py TARGET SIZE COUNT` speaks as `fairness_child.py` does, with `errors` besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any, Final

import grpc
import numpy as np

import stepwire
from fairness_child import Stepper
from stepwire.wire.channel_options import BULK_OPTIONS

__all__: list[str] = []

_OPTIONS: Final = (
    *BULK_OPTIONS,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)
_AT_ONCE: Final = 32
"""The clients that attach at the same time."""


class _Loop:
    """The steps of one client.

    Attributes:
        count: the number of its steps.
        seconds: the time of each.
        errors: 1 if one failed.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.count, self.seconds, self.errors = 0, list[float](), 0

    async def until(self, end: float) -> None:
        """Step until a moment."""
        self.count, self.seconds = 0, []
        try:
            while True:
                began = time.perf_counter()
                await self._stepper.step()
                if (now := time.perf_counter()) > end:
                    return
                self.count += 1
                self.seconds.append(now - began)
        except (RuntimeError, grpc.RpcError) as problem:
            print(problem, file=sys.stderr)
            self.errors = 1


async def _serve(target: str, size: int, session_ids: list[str]) -> None:
    gate, loop = asyncio.Semaphore(_AT_ONCE), asyncio.get_running_loop()

    async def attached(stack: contextlib.AsyncExitStack, session_id: str) -> Stepper:
        channel: Any = await stack.enter_async_context(grpc.aio.insecure_channel(target, options=_OPTIONS))
        stepper = Stepper(channel, session_id, size)
        async with gate:
            await stepper.attach()
            await stepper.step()
        return stepper

    async with contextlib.AsyncExitStack() as stack:
        steppers = await asyncio.gather(*(attached(stack, session_id) for session_id in session_ids))
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            loops = [_Loop(stepper) for stepper in steppers]
            end = time.perf_counter() + float(line)
            await asyncio.gather(*(each.until(end) for each in loops))
            found = {
                "counts": [each.count for each in loops],
                "seconds": [one for each in loops for one in each.seconds],
                "errors": sum(each.errors for each in loops),
            }
            print(json.dumps(found), flush=True)
        for stepper in steppers:
            stepper.cancel()


def main() -> None:
    """Make sessions, and step them when told to."""
    target, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with stepwire.connect(target, transport="tcp", timeout=300.0) as client:
        session_ids = [
            client.create_session({"w": np.zeros(size, np.float32)}, keep=True).session_id for _ in range(count)
        ]
    asyncio.run(_serve(target, size, session_ids))


if __name__ == "__main__":
    main()
