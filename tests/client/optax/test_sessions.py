"""Steps by number: twice, late or early."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402
from stepwire.errors import SessionNotFoundError, StepMismatchError, UnavailableError  # noqa: E402
from stepwire.optax import sessions  # noqa: E402
from stepwire.optax.connection import Connection  # noqa: E402
from stepwire.optax.sessions import ProgramStep, TrackedSession  # noqa: E402
from tests.support.lost_replies import lost_replies  # noqa: E402
from tests.support.torn_replies import torn_replies  # noqa: E402

ONES = [np.ones(3, np.float32)]


class Program:
    """Asks for steps as a transformation does, with the parameters of the state that it steps.

    Attributes:
        session: the session.
        parameters: by the count of a state, the parameters that belong to the state.
    """

    def __init__(self, session: stepwire.Session, size: int = 3) -> None:
        start = [np.zeros(size, np.float32)]
        self.session = session
        self.parameters = {0: start}
        self._tracked = TrackedSession(session, ["w"], start)

    def step(
        self, count: int, gradients: list[Any], lr: float | None = None, parameters: list[Any] | None = None
    ) -> list[Any]:
        before = parameters or self.parameters[min(count, max(self.parameters))]
        reply = self._tracked.step(ProgramStep(count, gradients, before, lr), np.float32)
        self.parameters[count + 1] = reply
        return reply


@pytest.fixture
def one(client: stepwire.Client) -> Program:
    return Program(client.create_session({"w": np.zeros(3, np.float32)}, optimizer=stepwire.SGD(lr=1.0)))


def test_a_step_that_comes_twice_is_applied_once(one: Program) -> None:
    first = one.step(0, ONES)
    again = one.step(0, ONES)
    assert first[0].tolist() == again[0].tolist() == [-1.0] * 3
    assert one.session.info().applied_step == 1
    assert one.step(1, ONES)[0].tolist() == [-2.0] * 3


@pytest.mark.parametrize(
    ("count", "gradients", "lr", "message"),
    [
        (1, [2 * ONES[0]], None, "is at step 1, .* is at step 2: that step was applied with another gradient"),
        (1, ONES, 0.5, "that step was applied with another gradient, because one state was used for two updates"),
        (0, ONES, None, "is at step 0, .* is at step 2: the state is an old one"),
        (3, ONES, None, "is at step 3, .* is at step 2: the state is ahead of the session"),
    ],
)
def test_a_step_out_of_turn_is_refused(
    one: Program, count: int, gradients: list[Any], lr: float | None, message: str
) -> None:
    for step in range(2):
        one.step(step, ONES)
    with pytest.raises(StepMismatchError, match=message) as refused:
        one.step(count, gradients, lr)
    assert refused.value.metadata == {"expected_step": "3", "actual_step": str(count + 1)}
    assert one.step(2, ONES)[0].tolist() == [-3.0] * 3


def test_a_step_that_failed_without_an_answer_may_come_again(one: Program) -> None:
    """It was applied and its answer lost: with the same gradient that is its outcome, with another one it is told."""
    for gradient, message in ((ONES, None), ([2 * ONES[0]], "the server had applied it with the first")):
        count = one.session.applied_step
        with lost_replies(), pytest.raises(UnavailableError):
            one.step(count, ONES)
        if message is None:
            assert one.step(count, gradient)[0].tolist() == [-1.0] * 3
        else:
            with pytest.raises(StepMismatchError, match=message):
                one.step(count, gradient)
            assert one.step(count, ONES)[0].tolist() == [-2.0] * 3
    assert one.session.info().applied_step == 2


def test_a_state_used_twice_in_a_program_steps_once(client: stepwire.Client) -> None:
    tx = stepwire.optax.sgd(1.0, server=client)
    params = {"w": jnp.zeros(3)}
    state = tx.init(params)
    step = jax.jit(tx.step)
    for _ in range(3):
        stepped, after = step(params, {"w": jnp.ones(3)}, state)
        assert stepped["w"].tolist() == [-1.0] * 3
    assert tx.session(state).applied_step == int(after.count) == 1
    with pytest.raises(StepMismatchError, match="another gradient"):
        tx.step(params, {"w": jnp.zeros(3)}, state)
    with pytest.raises(jax.errors.JaxRuntimeError, match="StepMismatchError: the optax state is at step 0"):
        jax.block_until_ready(step(params, {"w": jnp.zeros(3)}, state))


def test_a_state_from_another_process_finds_its_session(client: stepwire.Client) -> None:
    """A checkpoint restored: the state is data, and the session goes on where both are at the same step."""
    tx = stepwire.optax.sgd(1.0, server=client)
    params = {"w": jnp.zeros(3)}
    start = tx.init(params)
    params, state = tx.step(params, {"w": jnp.ones(3)}, start)
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
    tx.session(state).detach()
    sessions._tracked.pop(tx.session(state).session_id)
    params, state = jax.jit(tx.step)(params, {"w": jnp.ones(3)}, restored)
    assert params["w"].tolist() == [-2.0] * 3
    sessions._tracked.pop(tx.session(state).session_id)
    with pytest.raises(StepMismatchError, match="is at step 1, .* is at step 2: the state is an old one"):
        tx.step(params, {"w": jnp.ones(3)}, restored)
    tx.session(state).close()
    sessions.forget(tx.session(state).session_id)
    with pytest.raises(SessionNotFoundError):
        tx.step(params, {"w": jnp.ones(3)}, state)


@pytest.mark.parametrize("size", [3, 1 << 19], ids=["small", "large"])
def test_a_step_that_failed_and_was_not_applied_makes_room_for_another_gradient(
    client: stepwire.Client, size: int
) -> None:
    """A large gradient is fingerprinted while its step is under way."""
    session = client.create_session({"w": np.zeros(size, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
    program, gradient = Program(session, size), np.ones(size, np.float32)
    with lost_replies(applied=False), pytest.raises(UnavailableError):
        program.step(0, [gradient])
    assert program.step(0, [2 * gradient])[0].tolist() == [-2.0] * size
    with pytest.raises(StepMismatchError, match="with another gradient"):
        program.step(0, [gradient])
    assert program.step(0, [2 * gradient])[0].tolist() == [-2.0] * size
    assert session.info().applied_step == 1
    session.close()


def test_a_state_used_for_a_permuted_gradient_is_told(one: Program) -> None:
    first = np.float32([1, 2, 3])
    one.step(0, [first])
    for other in (first[::-1].copy(), -first):
        with pytest.raises(StepMismatchError, match="with another gradient"):
            one.step(0, [other])


def test_connections_are_shared_and_closed_with_the_last_session(target: str) -> None:
    connection, _ = Connection.read({"server": target, "timeout": 17.0})
    one = stepwire.optax.sgd(0.1, server=target, timeout=17.0)
    other = stepwire.optax.adam(0.1, server=target, timeout=17.0)
    params = {"w": jnp.ones(2)}
    first, second = one.init(params), other.init(params)
    client = sessions.client(connection)
    assert (
        one.session(first)._link.shards[0]._route.calls
        is other.session(second)._link.shards[0]._route.calls
        is client._server.server.calls
    )
    one.close(first)
    assert sessions.client(connection) is client
    other.close(second)
    assert sessions.client(connection) is not client
    sessions.client(connection).close()
    sessions._clients.pop(connection)


# --- steps in doubt -------------------------------------------------------------------------------------


def test_an_attempt_that_cannot_ask_for_the_outcome_leaves_the_record_of_the_step_in_doubt(one: Program) -> None:
    """The first gradient was applied. The second is not sent, so it must never count as applied."""
    one.step(0, ONES)
    with lost_replies(), pytest.raises(UnavailableError):
        one.step(1, [2 * ONES[0]])
    for _ in range(2):
        with torn_replies(), pytest.raises(UnavailableError, match="cannot be reached"):
            one.step(1, [3 * ONES[0]])
    with pytest.raises(StepMismatchError, match="the server had applied it with the first"):
        one.step(1, [3 * ONES[0]])
    assert one.step(1, [2 * ONES[0]])[0].tolist() == [-3.0] * 3
    assert one.session.info().applied_step == 2


def test_a_gradient_after_one_that_was_not_applied_survives_an_attempt_without_a_server(one: Program) -> None:
    with lost_replies(applied=False), pytest.raises(UnavailableError):
        one.step(0, ONES)
    with torn_replies(), pytest.raises(UnavailableError, match="cannot be reached"):
        one.step(0, [2 * ONES[0]])
    assert one.step(0, [4 * ONES[0]])[0].tolist() == [-4.0] * 3


# --- the table of sessions ------------------------------------------------------------------------------


class SlowClient:
    """A client with one session that answers late, and counts the requests for each session."""

    def __init__(self, session: stepwire.Session) -> None:
        self.asked: list[str] = []
        self.waiting, self.may_answer = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._session = session

    def session(self, session_id: str) -> stepwire.Session:
        self.asked.append(session_id)
        if session_id == "slow":
            self.waiting.set()
            assert self.may_answer.wait(60)
        if self.error is not None:
            raise self.error
        return self._session


@pytest.fixture
def slow(one: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowClient]:
    made = SlowClient(one.session)
    monkeypatch.setattr(sessions, "client", lambda connection: made)
    yield made
    for session_id in ("slow", "fast"):
        sessions._tracked.pop(session_id, None)


def test_a_server_that_answers_late_holds_up_no_other_session(slow: SlowClient, target: str) -> None:
    connection, _ = Connection.read({"server": target})
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(sessions.find, "slow", ["w"], connection)
        assert slow.waiting.wait(60)
        fast = threads.submit(sessions.find, "fast", ["w"], connection)
        try:
            assert fast.result(60) is sessions.tracked("fast")
            assert not late.done()
        finally:
            slow.may_answer.set()
        assert late.result(60) is sessions.tracked("slow")


def test_two_threads_that_look_for_a_session_attach_once(slow: SlowClient, target: str) -> None:
    connection, _ = Connection.read({"server": target})
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(sessions.find, "slow", ["w"], connection) for _ in range(2)]
        assert slow.waiting.wait(60)
        slow.may_answer.set()
        assert found[0].result(60) is found[1].result(60)
    assert slow.asked == ["slow"]


def test_a_session_that_was_not_found_is_looked_for_again(slow: SlowClient, target: str) -> None:
    connection, _ = Connection.read({"server": target})
    slow.error = UnavailableError("no server")
    with pytest.raises(UnavailableError, match="no server"):
        sessions.find("fast", ["w"], connection)
    slow.error = None
    assert sessions.find("fast", ["w"], connection) is sessions.tracked("fast")
    assert slow.asked == ["fast", "fast"]


def test_a_connection_stays_open_for_a_search_that_is_under_way(slow: SlowClient, target: str) -> None:
    connection, _ = Connection.read({"server": target})
    sessions.find("fast", ["w"], connection)
    kept = sessions._clients[connection] = stepwire.connect(target)
    try:
        with ThreadPoolExecutor(1) as threads:
            late = threads.submit(sessions.find, "slow", ["w"], connection)
            assert slow.waiting.wait(60)
            sessions.forget("fast")
            assert sessions._clients.get(connection) is kept
            slow.may_answer.set()
            late.result(60)
        sessions.forget("slow")
        assert connection not in sessions._clients
    finally:
        kept.close()
