"""The client's Python of a small step: on a packet lane whose other end is a stub in the same thread.

    python benchmarks/lane_python.py [--quick] [--profile CONTENDER]

Neither the kernel nor a server has a part in these times. The stub's own time is measured, and taken off. Beside them
are whole steps of torch's own optimizer, of the same ten tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import itertools
import math
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import numpy as np

import stepwire
from contest import Absent, Action, Contender, needed
from stepwire.transports import packets
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.testing import serving

__all__ = ["DICT_GOAL", "LOCAL", "PARAMETERS", "lane_python", "optimizer_of"]

DICT_GOAL: Final = "dict us"
"""Microseconds of a step of a dict of ten arrays, with a new reply."""

_REAL_STEPS: Final = 4
_SHAPES: Final = ((64, 64), (64,), (64, 64), (64,), (16, 64), (16,), (16, 16), (16,), (4, 16), (4,))
"""Ten tensors of some 10,000 parameters."""

PARAMETERS: Final = sum(math.prod(shape) for shape in _SHAPES)
"""Their parameters."""


class StubbedLane(packets.PacketLane):
    """A lane that replies by itself once it is stubbed: with the last real reply, and the next number."""

    stubbed = False

    def __init__(self, *arguments: Any) -> None:
        """See `PacketLane`."""
        super().__init__(*arguments)
        self._real = self.put
        self._reply = pb.AttachResponse()
        self.put = self._put

    def _put(self, message: bytes, flags: int, /) -> int:
        return len(message) if self.stubbed else self._real(message, flags)

    def receive(self, seconds: float) -> bytes | None:
        """See `PacketLane.receive`."""
        if self.stubbed:
            self._reply.result.step += 1
            return self._reply.SerializeToString()
        if (message := super().receive(seconds)) is not None:
            self._reply.ParseFromString(message)
        return message


def lane_python(*, rounds: int, batch: int) -> dict[str, Any]:
    """Return the microseconds of the client's Python in a step, for each contender; the median of rounds.

    Args:
        rounds: the turns of every contender.
        batch: the steps of a turn.
    """
    figures: dict[str, Any] = {"rounds": rounds, "batch": batch, "tensors": len(_SHAPES)}
    stub = _microseconds(_stub_alone(), rounds, batch)
    with _ready(_CONTENDERS, figures) as ready:
        for name, step in ready.items():
            figures[f"{name} us"] = _microseconds(step, rounds, batch) - stub
    with _ready(LOCAL, figures) as ready:
        for name, step in ready.items():
            figures[f"{name} us"] = _microseconds(step, rounds, batch)
    return figures


@contextlib.contextmanager
def _ready(contenders: tuple[Contender, ...], figures: dict[str, Any]) -> Iterator[dict[str, Action]]:
    """Yield the steps of those that can run here; the others are told among the figures."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(packets, "PacketLane", StubbedLane))
        ready = {}
        for contender in contenders:
            try:
                step = contender.prepare(stack, 0)
            except Absent as reason:
                figures[f"{contender.name} left out"] = str(reason)
                continue
            for _ in range(_REAL_STEPS):
                step()
            ready[contender.name] = step
        stack.enter_context(mock.patch.object(StubbedLane, "stubbed", True))
        yield ready


def _microseconds(step: Action, rounds: int, batch: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(batch):
            step()
        times.append((time.perf_counter() - began) / batch)
    return statistics.median(times) * 1e6


def _stub_alone() -> Action:
    """Return what the stub does in a step."""
    reply = pb.AttachResponse()
    reply.result.telemetry.grad_norm = 1.0

    def replied() -> None:
        reply.result.step += 1
        reply.SerializeToString()

    return replied


def _session(stack: contextlib.ExitStack) -> Any:
    client = stack.enter_context(stepwire.connect(stack.enter_context(serving(device="cpu")), transport="packets"))
    return stack.enter_context(client.create_session(_arrays()))


def _arrays() -> dict[str, Any]:
    return {f"{index}": np.ones(shape, np.float32) for index, shape in enumerate(_SHAPES)}


def _dict(stack: contextlib.ExitStack, size: int) -> Action:
    session, gradient = _session(stack), _arrays()
    return lambda: session.step(gradient)


def _new_arrays(stack: contextlib.ExitStack, size: int) -> Action:
    """Return a step whose gradient is in other arrays than the one before, as a program computes it."""
    session, gradients = _session(stack), itertools.cycle([_arrays() for _ in range(7)])
    return lambda: session.step(next(gradients))


def _out(stack: contextlib.ExitStack, size: int) -> Action:
    session, gradient, out = _session(stack), _arrays(), _arrays()
    return lambda: session.step(gradient, out=out)


def _in_place(stack: contextlib.ExitStack, size: int) -> Action:
    session = _session(stack)
    gradient, out = session.shared_gradients(), session.shared_parameters()
    return lambda: session.step(gradient, out=out)


def optimizer_of(make: Callable[[list[Any]], Any]) -> Any:
    """Return an optimizer of the ten tensors as parameters of torch, which have gradients.

    A backward pass behind the making of an optimizer puts them where that wants them.
    """
    torch = needed("torch")
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in _SHAPES]
    optimizer = make(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    return optimizer


def _torch(**options: Any) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        needed("torch")
        from stepwire.torch import Adam

        target = stack.enter_context(serving(device="cpu"))
        optimizer = optimizer_of(functools.partial(Adam, server=target, transport="packets", **options))
        stack.enter_context(contextlib.closing(optimizer))
        step: Action = optimizer.step
        return step

    return prepare


def _local(**options: Any) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        torch = needed("torch")
        step: Action = optimizer_of(functools.partial(torch.optim.Adam, **options)).step
        return step

    return prepare


_CONTENDERS: Final = (
    Contender("dict", _dict),
    Contender("dict, new arrays", _new_arrays),
    Contender("dict, out", _out),
    Contender("in place", _in_place),
    Contender("torch", _torch()),
    Contender("torch views", _torch(shared_views=True)),
)
LOCAL: Final = (Contender("local torch fused", _local(fused=True)), Contender("local torch default", _local()))


def main() -> None:
    """Print the figures, or the profile of one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--profile", metavar="CONTENDER", choices=[each.name for each in _CONTENDERS])
    arguments = parser.parse_args()
    if arguments.profile is None:
        scale = {"rounds": 2, "batch": 20} if arguments.quick else {"rounds": 50, "batch": 200}
        for name, value in lane_python(**scale).items():
            print(f"{name}: {value}")
        return
    with _ready(tuple(each for each in _CONTENDERS if each.name == arguments.profile), {}) as ready:
        for step in ready.values():
            with cProfile.Profile() as profile:
                for _ in range(2000):
                    step()
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
