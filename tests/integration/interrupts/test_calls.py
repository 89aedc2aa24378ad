"""Every call but steps, interrupted at every point of the caller's thread and at every line of the errand's.

After the interrupt the same call does what it would have done, and the steps that follow have the same bits. Calls of
sessions of one server, of several, and of the client are tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.errands import run
from stepwire_server.server import Server
from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

# Python itself ignores an exception that arrives in a finaliser.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.many]

SIZE = 40_000
FUTURES: dict[str, list[Any]] = {}
Act = Callable[[stepwire.Client, stepwire.Session], Any]


def values(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    return {name: draw.standard_normal(SIZE).astype(np.float32) for name in ("a", "b")}


def told(arrays: Any) -> bytes:
    return b"".join(arrays[name].tobytes() for name in ("a", "b"))


def load_state(client: stepwire.Client, session: stepwire.Session) -> None:
    state = stepwire.Snapshot(
        step=7,
        slots={slot: values(number) for number, slot in enumerate(session.slots)},
        tensor_steps={"a": 5, "b": 6},
    )
    state.slots["exp_avg_sq"] = {name: array**2 for name, array in state.slots["exp_avg_sq"].items()}
    session.load_state(state)


def found(client: stepwire.Client, session: stepwire.Session) -> bytes:
    return told(client.session(session.session_id).pull())


def step_async(client: stepwire.Client, session: stepwire.Session) -> bytes:
    """Hand a step in, unless that was done, and wait for its future."""
    handed_in = FUTURES.setdefault(session.session_id, [])
    if not handed_in:
        handed_in += [session.step_async(values(2))]
    return told(handed_in[0].result())


ACTS: dict[str, Act] = {
    "pull": lambda client, session: told(session.pull()),
    "state": lambda client, session: [told(arrays) for arrays in session.state().slots.values()],
    "load": lambda client, session: session.load(values(9)),
    "load_state": load_state,
    "attach": lambda client, session: session.attach(),
    "take over": lambda client, session: session.attach(take_over=True),
    "detach": lambda client, session: session.detach(),
    "info": lambda client, session: session.info().session_id == session.session_id,
    "find": found,
    "server": lambda client, session: client.info().version,
    "sessions": lambda client, session: session.session_id in ",".join(each.session_id for each in client.sessions()),
    "step_async": step_async,
}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(numpy_server(max_chunk_bytes=64 << 10)) for _ in range(2)]


@pytest.fixture(scope="module", params=[("auto", 1), ("tcp", 2)], ids=["one server", "two servers"])
def client(request: pytest.FixtureRequest, servers: list[Server]) -> Iterator[stepwire.Client]:
    transport, count = request.param
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    targets = [server.target for server in servers[:count]]
    with stepwire.connect(targets, transport=transport, timeout=120.0, retry=retry) as client:
        yield client


def start(client: stepwire.Client) -> stepwire.Session:
    session = client.create_session({name: np.zeros(SIZE, np.float32) for name in ("a", "b")})
    session.step(values(1))
    return session


def interrupted(call: Callable[[], Any], place: Arrival | Departure) -> bool:
    """Make a call, and tell whether it was interrupted."""
    try:
        with place:
            call()
    except KeyboardInterrupt:
        return True
    return False


def places(
    counting: Callable[[Arrival | Departure], bool], seed: str, kinds: Sequence[Any] = (Arrival, Departure)
) -> Iterator[Any]:
    for kind in kinds:
        counted = kind()
        assert not counting(counted)
        count = counted.points if kind is Arrival else counted.lines
        yield from map(kind, chosen(count, seed))


@pytest.mark.parametrize("name", ACTS)
def test_the_same_call_after_an_interrupt_has_the_same_effect(client: stepwire.Client, name: str) -> None:
    act = ACTS[name]

    def counting(place: Arrival | Departure) -> bool:
        with contextlib.closing(start(client)) as session:
            return interrupted(lambda: act(client, session), place)

    with contextlib.closing(start(client)) as session:
        result, last = act(client, session), told(session.step(values(3)))
    wrong = []
    # The errand of a background step has a caller who waits for something else.
    kinds = [Arrival] if name == "step_async" else [Arrival, Departure]
    for place in places(counting, name, kinds):
        with contextlib.closing(start(client)) as session:
            interrupted(lambda session=session: act(client, session), place)  # type: ignore[misc]
            if act(client, session) != result or told(session.step(values(3))) != last:
                wrong.append(str(place))
    assert wrong == []
    assert list(client.sessions()) == []


def test_a_creation_that_is_interrupted_leaves_no_session(client: stepwire.Client, servers: list[Server]) -> None:
    made: list[stepwire.Session] = []

    def create() -> None:
        made.append(client.create_session(values(0)))

    for place in places(lambda place: interrupted(create, place), "create"):
        while made:
            made.pop().close()
        interrupted(create, place)
        known = {part for session in made for part in session.session_id.split(",")}
        while {each.session_id for each in client.sessions()} != known:  # the last creation is being ended
            run(int)
    while made:
        made.pop().close()


def test_an_end_that_is_interrupted_is_made_all_the_same(client: stepwire.Client) -> None:
    for place in places(lambda place: interrupted(start(client).close, place), "close", [Arrival]):
        session = start(client)
        interrupted(session.close, place)
        session.close()
        assert list(client.sessions()) == []


def test_an_opening_that_is_interrupted_leaves_a_target_to_be_opened(servers: list[Server]) -> None:
    opened: list[stepwire.Client] = []

    def open_and_ask() -> str:
        opened.append(stepwire.connect(servers[0].target))
        return opened[-1].info().instance_id

    expected = open_and_ask()
    for place in places(lambda place: interrupted(open_and_ask, place), "connect"):
        interrupted(open_and_ask, place)
        assert open_and_ask() == expected
        while opened:
            opened.pop().close()
