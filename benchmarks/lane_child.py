"""Clients of one process, each with a session of its own, which step one after another.

`python lane_child.py TARGET TRANSPORT SIZE COUNT` prints "ready", and for each number of seconds that it reads the
steps of each session, as JSON. Before that it makes as many steps as a session makes before a loop is looked for.
The transport `doorbell` has a doorbell in the place of each session, and its path as the target.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

import stepwire
from doorbell import Doorbell
from stepwire_server.rpc.lane_gate import AFTER_STEPS
from variants import gradient_of, parameters_of

__all__: list[str] = []

_WARM_STEPS: Final = AFTER_STEPS + 16
"""More steps than a session makes before a loop is compiled for it."""


def _served(steps: Sequence[Callable[[], object]]) -> None:
    def warm() -> None:
        for _ in range(_WARM_STEPS):
            for step in steps:
                step()

    warm()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        warm()
        counts = [0] * len(steps)
        end = time.perf_counter() + float(line)
        while time.perf_counter() < end:
            for index, step in enumerate(steps):
                step()
                counts[index] += 1
        print(json.dumps(counts), flush=True)


def _session_steps(
    stack: contextlib.ExitStack, target: str, transport: str, size: int, count: int
) -> list[Callable[[], object]]:
    client = stack.enter_context(stepwire.connect(target, transport=transport, timeout=300.0))
    sessions: list[Any] = [stack.enter_context(client.create_session({"w": parameters_of(size)})) for _ in range(count)]
    for session in sessions:
        session.attach()
        if session.transport.name != transport:
            raise RuntimeError(f"transport {session.transport.name}: {session.transport.reasons}")
    gradient = {"w": gradient_of(size)}
    return [functools.partial(session.step, gradient, out={"w": np.empty(size, np.float32)}) for session in sessions]


def main() -> None:
    """Make sessions, and step them when told to."""
    target, transport, size, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with contextlib.ExitStack() as stack:
        if transport == "doorbell":
            _served([stack.enter_context(contextlib.closing(Doorbell(target))).ring for _ in range(count)])
        else:
            _served(_session_steps(stack, target, transport, size, count))


if __name__ == "__main__":
    main()
