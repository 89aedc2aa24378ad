"""Steps in device memory that a client on the same GPU has opened: they cross no bus.

The client is another process, whose context and the server's use the device by turns. So a step is timed alone, beside
a client that is idle, and behind a client that has just worked.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from gpu_clock import Gpu, Skipped, median, rounds
from gpu_sections import ADAM, Figures, adam_pass, adam_slots
from stepwire.errors import UnsupportedFeatureError
from stepwire.wire.dtypes import FLOAT32

__all__ = ["Client", "StartClient", "ipc"]

_GRANULE_BYTES = 2 << 20
_PATIENCE_SECONDS = 60.0


class Client(Protocol):
    """A client that has opened the memory.

    Attributes:
        seconds: see `gpu_ipc_child.Opened`.
    """

    seconds: dict[str, float]

    def write(self) -> None:
        """Write to the memory and wait until the device has it."""

    def close(self) -> None:
        """Let go of the memory."""


StartClient = Callable[[dict[str, Any]], Client]


def ipc(gpu: Gpu, size: int, start: StartClient | None = None) -> Figures:
    """Time whole steps, with a norm and a reply, by the wall.

    Args:
        gpu: the device with its extent.
        size: the parameters.
        start: starts a client with the description of the memory; None for a new process.
    """
    gpu.require(f"a step of {size:,} in shared device memory", device_bytes=20.1 * size + 4e6, host_bytes=1e6)
    half = -(-4 * size // _GRANULE_BYTES) * _GRANULE_BYTES
    try:
        exported = gpu.engine.export(2 * half)
    except UnsupportedFeatureError as problem:
        raise Skipped(str(problem)) from problem
    with contextlib.closing(exported), gpu.session(adam_slots(ADAM), size) as state:
        step, gradient, reply = adam_pass(ADAM), exported.array(0, FLOAT32, size), exported.array(half, FLOAT32, size)

        def whole_step() -> None:
            with contextlib.closing(state.receive()) as received:
                chunk = received.put(0, gradient)
                state.sum_of_squares(chunk, 0, size, 1.0).wait()
                state.update(step, 0, chunk, 0, size, reply).wait()
                state.settle()

        count = 3 * gpu.extent.rounds
        alone = rounds({"step": whole_step}, gpu.clock.by_the_wall, count)["step"]
        told = {"handle": exported.handle.hex(), "uuid": exported.device_uuid.hex(), "nbytes": 2 * half}
        with contextlib.closing((start or _Process)(told)) as client:
            beside = rounds({"step": whole_step}, gpu.clock.by_the_wall, count)["step"]
            behind = [_behind(client, whole_step) for _ in range(count)]
            seconds = client.seconds
    return {
        "step_ms": median(alone) * 1e3,
        "step_beside_client_ms": median(beside) * 1e3,
        "step_behind_client_ms": median(behind) * 1e3,
        "client_context_seconds": seconds["context"],
        "client_open_ms": seconds["open"] * 1e3,
        "client_synchronize_us": seconds["synchronize"] * 1e6,
    }


def _behind(client: Client, step: Callable[[], None]) -> float:
    client.write()
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


class _Process:
    """A client in a process of its own."""

    def __init__(self, told: dict[str, Any]) -> None:
        path, pipe = pathlib.Path(__file__).with_name("gpu_ipc_child.py"), subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, path], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.seconds: dict[str, float] = json.loads(self._answer(json.dumps(told)))

    def write(self) -> None:
        self._answer("")

    def close(self) -> None:
        self._process.communicate(timeout=_PATIENCE_SECONDS)

    def _answer(self, line: str) -> str:
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            if answer := self._process.stdout.readline():
                return answer
        except BrokenPipeError:
            pass
        _, told = self._process.communicate(timeout=_PATIENCE_SECONDS)
        raise Skipped(f"a client process failed: {(told.strip().splitlines() or ['it said nothing'])[-1]}")
