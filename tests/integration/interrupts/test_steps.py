"""Steps whose caller is interrupted, at every point of the caller's thread and at every line of the errand's.

After the interrupt the caller goes on, in one of two ways. The same gradient again is the same step: the parameters are
those of a run without the interrupt. Another gradient is the next step, whether the interrupted one was applied or not.
The suite tries some places of each step, drawn by a seed, and `make interrupts` tries all of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

SIZE = 40_000
"""Elements of a tensor; a message holds 16,384 of them in float32."""

SMALL = 500
"""Elements of a tensor of a step that fits into packets."""


class Kind(NamedTuple):
    """A kind of step.

    Attributes:
        transport: the transport of the session.
        creation: the options of the session.
        step: the options of its steps.
        servers: the servers of the session.
        memory: they share memory; else the session is small enough for packets.
    """

    transport: str
    creation: dict[str, Any] = {}
    step: dict[str, Any] = {}
    servers: int = 1
    memory: bool = True


KINDS = {
    "tcp": Kind("tcp"),
    "uds": Kind("uds", {"clip_grad_norm": 1.0}),
    "shm": Kind("shm"),
    "packets": Kind("packets"),
    "packets without memory": Kind("packets", {}, {"reply": "parameters"}, memory=False),
    "packets by an errand": Kind("packets", {}, {"on_tensor": lambda name, values: None}),
    "overlap": Kind("tcp", {"non_finite": "allow"}, {"overlap": True}),
    "changed": Kind("tcp", {"reply_dtype": "bfloat16"}, {"reply": "changed"}),
    "int8": Kind("tcp", {"gradient_dtype": "int8", "error_feedback": True}),
    "sharded": Kind("tcp", {"clip_grad_norm": 1.0}, servers=2),
}
Place = tuple[type[Arrival] | type[Departure], int]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        with_memory = [stack.enter_context(numpy_server(max_chunk_bytes=64 << 10)) for _ in range(2)]
        yield [*with_memory, stack.enter_context(numpy_server(shared_memory=False))]


@pytest.fixture(scope="module", params=list(KINDS))
def opened(request: pytest.FixtureRequest, servers: list[Server]) -> Iterator[Callable[[], stepwire.Session]]:
    """Open a session of a kind, after its first step."""
    kind = KINDS[request.param]
    targets = [server.target for server in (servers[: kind.servers] if kind.memory else servers[-1:])]
    size = SIZE if kind.memory else SMALL
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with stepwire.connect(targets, transport=kind.transport, timeout=120.0, retry=retry) as client:

        def start() -> stepwire.Session:
            names = ("a", "b")
            session = client.create_session(dict.fromkeys(names, np.zeros(size, np.float32)), **kind.creation)
            session.step = functools.partial(session.step, **kind.step)  # type: ignore[method-assign]
            session.step(gradient(1, size))
            return session

        yield start


def gradient(number: int, size: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    return {name: draw.standard_normal(size).astype(np.float32) for name in ("a", "b")}


def gradient_of(session: stepwire.Session, number: int) -> dict[str, Any]:
    return gradient(number, *session.shapes["a"])


def course(session: stepwire.Session, *numbers: int) -> list[bytes]:
    """Take steps, and return their replies."""
    replies: list[Any] = [session.step(gradient_of(session, number)) for number in numbers]
    return [b"".join(reply[name].tobytes() for name in ("a", "b")) for reply in replies]


def interrupted(session: stepwire.Session, place: Arrival | Departure) -> bool:
    """Take the second step, and tell whether it was interrupted."""
    second = gradient_of(session, 2)
    try:
        with place:
            session.step(second)
    except KeyboardInterrupt:
        return True
    return False


def places(opened: Callable[[], stepwire.Session], seed: str) -> list[Place]:
    """Return places of a step: the points of the caller's thread, and the lines of the errand's."""
    found: list[Place] = []
    for kind in (Arrival, Departure):
        with contextlib.closing(opened()) as session:
            place = kind()
            assert not interrupted(session, place)
            count = place.points if isinstance(place, Arrival) else place.lines
            found += [(kind, at) for at in chosen(count, seed)] if count else []  # a direct step has no errand
    return found


@contextlib.contextmanager
def broken_off(opened: Callable[[], stepwire.Session], kind: type[Arrival] | type[Departure], at: int) -> Iterator[Any]:
    """Open a session whose second step is interrupted at a place.

    A run in which threads meet otherwise than when the places were counted may end before it. Then an earlier one is
    taken.
    """
    for earlier in range(at, -1, -16):
        with contextlib.closing(opened()) as session:
            if interrupted(session, kind(earlier)):
                yield session
                return
    raise AssertionError((kind, at))


def test_the_same_gradient_after_an_interrupt_is_the_same_step(opened: Callable[[], stepwire.Session]) -> None:
    with contextlib.closing(opened()) as session:
        undisturbed = course(session, 2, 3)
    wrong = []
    for kind, at in places(opened, "same"):
        with broken_off(opened, kind, at) as session:
            if course(session, 2, 3) != undisturbed or session.applied_step != 3:
                wrong.append((kind.__name__, at))
    assert wrong == []


def test_another_gradient_after_an_interrupt_is_the_next_step(opened: Callable[[], stepwire.Session]) -> None:
    with contextlib.closing(opened()) as session:
        undisturbed = {3: course(session, 2, 3)[-1:]}
    with contextlib.closing(opened()) as session:
        undisturbed[2] = course(session, 3)
    wrong = []
    for kind, at in places(opened, "another"):
        with broken_off(opened, kind, at) as session:
            try:
                reply = course(session, 3)
            except stepwire.SessionNotReadyError:  # a step with overlap is half applied, and is to be finished
                reply = course(session, 2, 3)[-1:]
            except stepwire.StepMismatchError:  # some shards have applied it, likewise
                reply = course(session, 2, 3)[-1:]
            if reply != undisturbed.get(session.applied_step):
                wrong.append((kind.__name__, at, session.applied_step))
    assert wrong == []


def test_a_second_interrupt_while_the_first_is_dealt_with_changes_nothing(
    opened: Callable[[], stepwire.Session],
) -> None:
    with contextlib.closing(opened()) as session:
        undisturbed = course(session, 2, 3)
        last = max(at for kind, at in places(opened, "second") if kind is Arrival)
    wrong = []
    for after in chosen(12, "after"):
        with contextlib.closing(opened()) as session:
            interrupted(session, Arrival(last, last + 1 + after))
            if course(session, 2, 3) != undisturbed:
                wrong.append((last, after))
    assert wrong == []
