"""The command `stepwire bench`: the speed of steps between here and a running server."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Annotated, Final

import numpy as np
import typer

import stepwire
from stepwire_server.cli.options import Json, Target, Timeout

__all__ = ["BenchReport", "bench", "measure"]

_WARM_UP_STEPS: Final = 5
_LEASE_SECONDS: Final = 60.0
_MILLISECONDS: Final = 1e3


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """The times of equal steps, one after another.

    Attributes:
        parameters: the number of parameters of the session.
        steps: the number of steps that were measured.
        transport: the name of the transport, such as "shm".
        device: the device of the session's state.
        steps_per_second: the steps by the time of all of them.
        p50_seconds: the median time of a step, as its caller sees it.
        p99_seconds: the time that one step in a hundred exceeds, likewise.
        apply_seconds: the median time in which the server computes a step.
        queue_seconds: the median time for which a step waits on the server.
        gradient_bytes_per_second: the bytes of gradients by the time of all steps; as many come back as parameters.
    """

    parameters: int
    steps: int
    transport: str
    device: str
    steps_per_second: float
    p50_seconds: float
    p99_seconds: float
    apply_seconds: float
    queue_seconds: float
    gradient_bytes_per_second: float

    def text(self) -> str:
        """Return the report as lines of text."""
        where = f"on {self.device} by {self.transport}"
        return "\n".join(
            (
                f"session           {self.parameters:,} parameters, Adam, float32, {where}",
                f"steps             {self.steps}, {self.steps_per_second:,.1f} a second",
                f"time of a step    p50 {self.p50_seconds * _MILLISECONDS:.3f} ms, "
                f"p99 {self.p99_seconds * _MILLISECONDS:.3f} ms",
                f"of it the server  apply {self.apply_seconds * _MILLISECONDS:.3f} ms, "
                f"queue {self.queue_seconds * _MILLISECONDS:.3f} ms (medians)",
                f"gradients         {self.gradient_bytes_per_second / 1e6:,.1f} MB/s, and as much back",
            )
        )


def bench(
    target: Target,
    parameters: Annotated[
        int, typer.Option(min=1, help="The number of parameters; the server holds 12 bytes for each.")
    ] = 1_000_000,
    steps: Annotated[int, typer.Option(min=1, help="The number of steps to measure.")] = 100,
    transport: Annotated[str, typer.Option(help="The transport: auto, tcp, uds, shm, packets or cuda_ipc.")] = "auto",
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Measure steps of a session of its own on a running server, and close the session.

    The session shares the server with all others, so its times are those that one more client would see.
    """
    with stepwire.connect(target, timeout=timeout, transport=transport) as client:
        with client.create_session(
            {"w": np.zeros(parameters, np.float32)},
            optimizer=stepwire.Adam(lr=1e-3),
            lease_seconds=_LEASE_SECONDS,
            label="stepwire bench",
        ) as session:
            report = measure(session, steps)
    print(json.dumps(dataclasses.asdict(report)) if as_json else report.text())


def measure(session: stepwire.Session, steps: int, clock: Callable[[], float] = time.perf_counter) -> BenchReport:
    """Step a session of one flat tensor, and tell the times.

    Args:
        session: the session; it is stepped with random numbers.
        steps: the number of steps that are measured, after some that are not.
        clock: returns seconds.
    """
    ((name, shape),) = session.shapes.items()
    gradient = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    reply = {name: np.empty(shape, np.float32)}
    for _ in range(_WARM_UP_STEPS):
        session.step(gradient, out=reply)
    ends, results = [clock()], []
    for _ in range(steps):
        session.step(gradient, out=reply)
        ends.append(clock())
        results.append(session.last_result)
    times, total = np.diff(ends), ends[-1] - ends[0]
    assert session.transport is not None
    return BenchReport(
        parameters=gradient[name].size,
        steps=steps,
        transport=session.transport.name,
        device=session.info().device,
        steps_per_second=steps / total,
        p50_seconds=float(np.percentile(times, 50)),
        p99_seconds=float(np.percentile(times, 99)),
        apply_seconds=float(np.median([result.apply_seconds for result in results if result is not None])),
        queue_seconds=float(np.median([result.queue_seconds for result in results if result is not None])),
        gradient_bytes_per_second=gradient[name].nbytes * steps / total,
    )
