"""The floors of a step: the same bytes moved without an optimizer, and the other work of a step alone.

A step moves a gradient up and parameters down. "Push, pull" moves all bytes up and then all bytes down. "Duplex" sends
each block or message back as it comes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import stepwire
from contest import Action, Contender
from echo import EchoStream, EchoTargets, bulk_messages
from sockets import Addresses, SocketStream
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import PARAM, Pass
from stepwire_server.rules import Precision, Recipe, rule_for

__all__ = ["COPIES", "ENGINE", "engine_step", "grpc_floors", "parts", "socket_floors"]

ENGINE = "engine alone"
COPIES = "one copy each side"


def socket_floors(at: Addresses) -> list[Contender]:
    """Return plain sockets, and copies through shared memory."""
    return [
        Contender("raw TCP push, pull", _sockets(at.tcp, SocketStream.push_pull)),
        Contender("raw TCP duplex", _sockets(at.tcp, SocketStream.duplex)),
        Contender("raw Unix socket push, pull", _sockets(at.unix, SocketStream.push_pull)),
        Contender("raw Unix socket duplex", _sockets(at.unix, SocketStream.duplex)),
        Contender("three shared-memory copies", _shared_copies),
    ]


def grpc_floors(at: EchoTargets) -> list[Contender]:
    """Return raw gRPC streams."""
    return [
        Contender("raw gRPC push, pull", _stream(at.tcp, "PushPull")),
        Contender("raw gRPC duplex", _stream(at.tcp, "Duplex")),
        Contender("raw gRPC push, pull, Unix socket", _stream(at.unix, "PushPull")),
        Contender("raw gRPC duplex, Unix socket", _stream(at.unix, "Duplex")),
    ]


def parts() -> list[Contender]:
    """Return the work of a step without the transfer."""
    return [Contender(ENGINE, _engine), Contender(COPIES, _copies)]


def engine_step(size: int, gradient: np.ndarray[Any, Any]) -> tuple[CpuEngine, Action]:
    """The engine's own pass over all elements, in this process: decode, rule, and encode into a reply."""
    rule, _ = rule_for(stepwire.Adam(), momentum=False)
    recipe, engine = Recipe(rule, measures=True), CpuEngine()
    state = engine.allocate(dict.fromkeys((PARAM, *rule.slots), Precision.FLOAT32), size)
    staged, out = state.receive().put(0, gradient), np.empty_like(gradient)
    step = Pass(recipe, (1.0, 1.0, *rule.scalars(stepwire.Adam().hyperparameters(), 1)))
    return engine, lambda: state.update(step, 0, staged, 0, size, out).wait()


def _sockets(
    address: tuple[str, int] | str, exchange: Callable[[SocketStream, memoryview, memoryview], None]
) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        stream = stack.enter_context(contextlib.closing(SocketStream(address)))
        up, down = (np.ones(size, FLOAT32).data.cast("B") for _ in range(2))
        return lambda: exchange(stream, up, down)

    return prepare


def _stream(target: str, method: str) -> Callable[[contextlib.ExitStack, int], Action]:
    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        stream = stack.enter_context(contextlib.closing(EchoStream(target, method)))
        messages = bulk_messages(size * FLOAT32.itemsize)
        return lambda: stream.exchange(messages)

    return prepare


def _shared_copies(stack: contextlib.ExitStack, size: int) -> Action:
    """Copy a gradient into shared memory, parameters into shared memory, and those out of it."""
    own = [np.ones(size, FLOAT32) for _ in range(3)]
    shared = [_shared(size), _shared(size)]
    route: Sequence[tuple[Any, Any]] = ((shared[0], own[0]), (shared[1], own[1]), (own[2], shared[1]))

    def copy() -> None:
        for target, source in route:
            np.copyto(target, source)

    return copy


def _shared(size: int) -> np.ndarray[Any, Any]:
    """Return memory that another process could map; it is unmapped with the array."""
    descriptor = os.memfd_create("stepwire-benchmark")
    try:
        os.ftruncate(descriptor, size * FLOAT32.itemsize)
        return np.frombuffer(mmap.mmap(descriptor, size * FLOAT32.itemsize), FLOAT32)
    finally:
        os.close(descriptor)


def _engine(stack: contextlib.ExitStack, size: int) -> Action:
    engine, step = engine_step(size, np.random.default_rng(0).standard_normal(size, np.float32))
    stack.callback(engine.close)
    return step


def _copies(stack: contextlib.ExitStack, size: int) -> Action:
    source, target = np.ones(size, FLOAT32), np.empty(size, FLOAT32)

    def copy() -> None:
        for _ in range(2):
            np.copyto(target, source)

    return copy
