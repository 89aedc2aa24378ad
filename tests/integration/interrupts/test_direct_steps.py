"""Steps on a packet lane, which the caller's own thread makes: interrupts, and handlers that call the session.

The tests of interrupted steps try the points of such a step too. Here are its waits, and handlers that return.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.arrays import recognised
from stepwire.arrays.reply_memory import ReplyMemory
from stepwire.connection.errands import as_a_whole
from stepwire.errors import DeadlineExceededError
from stepwire.transports.host import copies
from stepwire_server.server import Server
from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure, signalled
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

EXCEPTIONS = {
    signal.SIGINT: KeyboardInterrupt(),
    signal.SIGTERM: SystemExit(143),
    signal.SIGALRM: TimeoutError("the alarm"),
}
ONES, TWOS, FOURS = ({"w": np.full(3, value, np.float32)} for value in (1.0, 2.0, 4.0))


@pytest.fixture(scope="module", params=[True, False], ids=["memory", "packets alone"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with numpy_server(shared_memory=request.param) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[stepwire.Client]:
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    with stepwire.connect(server.target, transport="packets", timeout=120.0, retry=retry) as client:
        yield client


@contextlib.contextmanager
def stepped(client: stepwire.Client) -> Iterator[stepwire.Session]:
    """A session of SGD with rate 1 after its first step: the parameters are minus the sum of the gradients."""
    session = client.create_session({"w": np.zeros(3, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
    with contextlib.closing(session):
        session.step(ONES)
        yield session


@pytest.fixture
def session(client: stepwire.Client) -> Iterator[stepwire.Session]:
    with stepped(client) as session:
        yield session


@contextlib.contextmanager
def held_back(server: Server, session: stepwire.Session, until: Any) -> Iterator[Callable[[], None]]:
    """Keep the server from replying, for a block, or until the function is called."""
    held, done = threading.Event(), threading.Event()
    until(lambda: not in_step(server))  # a reply comes before the server is done

    def hold() -> None:
        with server.registry.get(session.session_id)._lock:
            held.set()
            done.wait(60.0)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60.0)

    def release() -> None:
        done.set()
        holder.join(60.0)

    try:
        yield release
    finally:
        release()


def in_step(server: Server) -> bool:
    return server.statistics().drain.steps > 0


def value(parameters: Any) -> float:
    return float(parameters["w"][0])


def test_a_step_on_a_lane_has_no_errand(session: stepwire.Session) -> None:
    with Departure() as counted:
        session.step(TWOS)
    assert counted.lines == 0
    with Departure() as counted:
        session.step(TWOS, on_tensor=lambda name, values: None)
    assert counted.lines > 0


def test_a_step_whose_outcome_reached_nobody_is_in_doubt(session: stepwire.Session) -> None:
    """The caller's work behind the step is interrupted, so the same call again is the same step."""

    def whole() -> None:
        session.step(TWOS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_a_whole(whole)
    assert session.statistics().step_in_doubt == session.applied_step == 2
    assert value(session.step(TWOS)) == -3.0
    assert session.statistics().step_in_doubt is None
    assert value(session.step(FOURS)) == -7.0
    assert session.info().applied_step == 3


def test_a_background_step_that_ended_before_its_caller_had_a_future_is_in_doubt(session: stepwire.Session) -> None:
    def whole() -> None:
        session.step_async(TWOS).result()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_a_whole(whole)
    assert session.statistics().step_in_doubt == session.applied_step == 2
    assert value(session.step_async(TWOS).result()) == -3.0
    assert session.info().applied_step == 2


@pytest.mark.parametrize("number", EXCEPTIONS, ids=lambda number: number.name)
def test_a_wait_ends_with_the_exception_of_a_handler(
    server: Server, session: stepwire.Session, until: Any, number: int
) -> None:
    with (
        held_back(server, session, until),
        pytest.raises(type(EXCEPTIONS[number])),
        signalled(EXCEPTIONS[number], lambda: until(lambda: in_step(server)), number),
    ):
        session.step(TWOS)
    assert session.statistics().step_in_doubt == 2
    assert value(session.step(TWOS)) == -3.0
    assert value(session.step(TWOS)) == -5.0
    assert session.info().applied_step == 3


def test_a_gradient_that_is_overwritten_after_an_interrupt_is_another_step(
    server: Server, session: stepwire.Session, until: Any
) -> None:
    gradient = {"w": np.full(3, 2.0, np.float32)}
    with (
        held_back(server, session, until),
        pytest.raises(KeyboardInterrupt),
        signalled(KeyboardInterrupt(), lambda: until(lambda: in_step(server))),
    ):
        session.step(gradient)
    gradient["w"][:] = 4.0
    assert value(session.step(gradient)) in (-5.0, -7.0)
    assert value(session.pull()) == {2: -5.0, 3: -7.0}[session.applied_step]


def test_signals_whose_handlers_return_do_not_prolong_a_wait(
    server: Server, session: stepwire.Session, until: Any
) -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with held_back(server, session, until), pytest.raises(DeadlineExceededError, match=r"no reply within 0\.2 s"):
            session.step(TWOS, timeout=0.2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert value(session.step(TWOS)) == -3.0


CALLS: dict[str, Callable[[stepwire.Session], Any]] = {
    "step": lambda session: session.step(FOURS),
    "step with an errand": lambda session: session.step(FOURS, on_tensor=lambda name, values: None),
    "pull": lambda session: session.pull(),
    "load": lambda session: session.load({"w": np.full(3, 10.0, np.float32)}),
    "attach": lambda session: session.attach(),
    "detach": lambda session: session.detach(),
}


def outcomes(call: str) -> set[float]:
    """Return the parameters that a step of `TWOS` and a call may lead to, in either order."""
    return {"step": {-7.0}, "step with an errand": {-7.0}, "load": {10.0, 8.0}}.get(call, {-3.0})


@contextlib.contextmanager
def handled(handler: Callable[[], object], number: int = signal.SIGINT) -> Iterator[None]:
    before = signal.signal(number, lambda number, frame: handler())
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("call", CALLS)
def test_a_handler_may_call_the_session_whose_step_waits(
    server: Server, session: stepwire.Session, until: Any, call: str
) -> None:
    done = threading.Event()
    main = threading.get_ident()
    with held_back(server, session, until) as release:

        def once() -> None:
            if not done.is_set():
                done.set()
                release()
                CALLS[call](session)

        def send() -> None:
            until(lambda: in_step(server))
            while not done.wait(0.01):
                signal.pthread_kill(main, signal.SIGUSR1)

        sender = threading.Thread(target=send)
        with handled(once, signal.SIGUSR1):
            sender.start()
            session.step(TWOS)
            sender.join(60.0)
    assert value(session.pull()) in outcomes(call)
    assert session.applied_step == session.info().applied_step
    session.step(TWOS)


@pytest.mark.parametrize("call", CALLS)
def test_a_handler_may_call_the_session_at_every_point_of_a_step(client: stepwire.Client, call: str) -> None:
    with stepped(client) as session, Arrival() as counted:
        session.step(TWOS)
    wrong = []
    for at in chosen(counted.points, call):
        with stepped(client) as session:
            place = Arrival(at)
            with handled(lambda session=session: CALLS[call](session)), place:  # type: ignore[misc]
                reply = session.step(TWOS)
            if set(reply["w"].tolist()) not in ({each} for each in outcomes(call) | {-3.0}):
                wrong.append((at, reply["w"]))
            if not place.arrived:  # a reply came sooner than when the points were counted
                continue
            found, steps = value(session.pull()), session.applied_step
            if found not in outcomes(call) or steps != 2 + call.startswith("step"):
                wrong.append((at, found, steps))
            before = found - 2.0
            if value(session.step(TWOS)) != before or session.info().applied_step != steps + 1:
                wrong.append((at, "next"))
    assert wrong == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [dict, list])
def test_the_reply_is_whole_where_a_handler_comes_while_its_arrays_are_made(
    client: stepwire.Client, call: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [np.zeros(3, np.float32), np.zeros((2, 2), np.float32)]

    def named(arrays: list[Any]) -> Any:
        return arrays if kind is list else {"w": arrays[0], "v": arrays[1]}

    made, pending = ReplyMemory.empty, [True]
    calls = CALLS | {
        "step": lambda session: session.step(named([array + 4 for array in start])),
        "step with an errand": lambda session: session.step_async(named([array + 4 for array in start])).result(),
        "load": lambda session: session.load(named([array + 10 for array in start])),
    }

    def empty(memory: ReplyMemory, size: int, dtype: Any) -> Any:
        values = made(memory, size, dtype)
        values[:] = 777.0  # what new memory happens to have
        if pending:
            pending.clear()
            signal.raise_signal(signal.SIGUSR1)
        return values

    with contextlib.closing(client.create_session(named(start), optimizer=stepwire.SGD(lr=1.0))) as session:
        session.step(named([array + 1 for array in start]))
        monkeypatch.setattr(ReplyMemory, "empty", empty)
        with handled(lambda: calls[call](session), signal.SIGUSR1):
            reply = session.step(named([array + 2 for array in start]))
        assert not pending
        arrays = reply if kind is list else [reply["w"], reply["v"]]
        assert (type(reply), len(reply), [array.shape for array in arrays]) == (kind, 2, [(3,), (2, 2)])
        (found,) = {float(element) for array in arrays for element in array.reshape(-1)}
        assert found in outcomes(call) | {-3.0}


@pytest.mark.parametrize("call", ["step", "load"])
def test_arrays_of_the_users_have_one_step_where_a_handler_comes_while_they_are_written(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(value: float) -> dict[str, Any]:
        return {"w": np.full(3, value, np.float32), "v": np.full((2, 2), value, np.float32)}

    written = copies._copy
    calls = {"step": lambda: session.step(filled(4.0)), "load": lambda: session.load(filled(9.0))}

    def copy(pairs: Any) -> None:
        monkeypatch.setattr(copies, "_copy", written)
        written(pairs[:1])
        signal.raise_signal(signal.SIGUSR1)
        written(pairs[1:])

    with (
        numpy_server() as server,
        stepwire.connect(server.target, transport="packets", timeout=120.0) as client,
        client.create_session(filled(0.0), optimizer=stepwire.SGD(lr=1.0)) as session,
    ):
        gradient, out = filled(1.0), filled(0.0)
        for _ in range(4):
            session.step(gradient, out=out)
        monkeypatch.setattr(copies, "_copy", copy)
        with handled(calls[call], signal.SIGUSR1):
            assert session.step(gradient, out=out) is out
        assert {float(value) for array in out.values() for value in array.reshape(-1)} == {-5.0}
        assert session.info().applied_step == session.applied_step == 5 + (call == "step")


@pytest.mark.parametrize("at", range(1, 12))
def test_a_handler_whose_gradients_have_another_order_moves_no_other_tensors(
    client: stepwire.Client, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes while arrays are looked at: those of both steps, and of later ones, keep their names."""
    count, zero, one = [0], np.zeros(2, np.float32), np.ones(2, np.float32)

    class Counted(list[Any]):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            count[0] += 1
            if count[0] == at:
                signal.raise_signal(signal.SIGUSR1)

    with contextlib.closing(client.create_session({"a": zero, "b": zero}, optimizer=stepwire.SGD(lr=1.0))) as session:
        session.step({"a": zero.copy(), "b": zero.copy()})
        monkeypatch.setattr(recognised, "list", Counted, raising=False)
        with handled(lambda: session.step({"a": zero.copy(), "b": zero.copy()}), signal.SIGUSR1):
            session.step({"b": zero.copy(), "a": zero.copy()})
        monkeypatch.undo()
        for gradient in ({"b": zero.copy(), "a": one}, {"a": one, "b": zero.copy()}):
            session.step(gradient)
        assert {name: values.tolist() for name, values in session.pull().items()} == {"a": [-2.0] * 2, "b": [0.0] * 2}


def test_an_exception_that_another_thread_sets_leaves_a_step_likewise(client: stepwire.Client) -> None:
    class Ended(Exception):
        pass

    with stepped(client) as session, Arrival(exception=Ended) as counted:
        session.step(TWOS)
    wrong = []
    for at in chosen(counted.points, "set"):
        with stepped(client) as session:
            with contextlib.suppress(Ended), Arrival(at, exception=Ended):
                session.step(TWOS)
            if value(session.step(TWOS)) not in (-3.0, -5.0) or session.applied_step != session.info().applied_step:
                wrong.append(at)
    assert wrong == []
