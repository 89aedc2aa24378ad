"""Loads and creations that are repeated, late or given up: done once, and never in place of what came after."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from tests.integration.proxy import Proxy
from tests.integration.training import SMALL, bits, same_bits
from tests.support.raw import RawClient, Refused, Vector

_SIZE = 12
_SEED = 78

Opened = Callable[[str], stepwire.Client]
Held = tuple[str, int]
"""A session's id and the token of its worker."""


def gradient(step: int) -> Vector:
    """Return the gradient of a step, the same whenever it is asked for."""
    return np.random.default_rng((_SEED, step)).standard_normal(_SIZE, np.float32)


@pytest.fixture
def state(client: stepwire.Client) -> Callable[[Held], stepwire.Snapshot]:
    """Read all of a session's state."""
    return lambda held: client.session(held[0]).state()


def ends_the_answer(message: bytes) -> bool:
    """Tell whether a message from the server is the last of an answer to a step."""
    return pb.AttachResponse.FromString(message).HasField("result")


# --- loads -------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(raw: RawClient) -> Held:
    """A session that waits for its parameters."""
    created = raw.create(_SIZE, zeros=False)
    return created.session.session_id, created.attach_token


def test_a_load_sent_twice_is_loaded_once(raw, unloaded, state) -> None:
    first, again = (raw.load(*unloaded, 1, gradient(0)) for _ in range(2))
    assert (first.replayed, again.replayed) == (False, True)
    assert (first.session.applied_load, again.session.applied_load) == (1, 1)
    assert state(unloaded).slots["param"]["w"].tobytes() == gradient(0).tobytes()


def test_a_delayed_duplicate_of_a_load_does_not_undo_the_steps_since(raw, unloaded, state) -> None:
    raw.load(*unloaded, 1, gradient(0))
    for step in range(1, 4):
        raw.step(*unloaded, step, gradient(step))
    before = state(unloaded)
    assert raw.load(*unloaded, 1, gradient(0)).replayed
    assert same_bits(state(unloaded), before)
    raw.load(*unloaded, 2, gradient(9))
    with pytest.raises(Refused) as refused:
        raw.load(*unloaded, 1, gradient(0))
    assert refused.value.row == ("ABORTED", "STEP_SUPERSEDED")
    assert refused.value.metadata == {"expected_load": "3", "actual_load": "1"}
    assert state(unloaded).slots["param"]["w"].tobytes() == gradient(9).tobytes()


@pytest.mark.parametrize(
    ("load", "reason"), [(0, "STEP_SUPERSEDED"), (2, "STEP_MISMATCH"), (2**64 - 1, "STEP_MISMATCH")]
)
def test_a_load_that_is_not_next(raw, unloaded, load: int, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        raw.load(*unloaded, load, gradient(0))
    assert refused.value.row == ("ABORTED", reason)
    assert refused.value.metadata == {"expected_load": "1", "actual_load": str(load)}
    assert not raw.load(*unloaded, 1, gradient(0)).replayed


def test_a_step_before_the_first_load_is_refused_and_not_used_up(raw, unloaded) -> None:
    with pytest.raises(Refused) as refused:
        raw.step(*unloaded, 1, gradient(1))
    assert refused.value.row == ("FAILED_PRECONDITION", "SESSION_NOT_READY")
    raw.load(*unloaded, 1, gradient(0))
    assert not raw.step(*unloaded, 1, gradient(1)).result.replayed


# --- creations ---------------------------------------------------------------------------------------------


def test_a_creation_sent_twice_makes_one_session(raw, server) -> None:
    first = raw.create(request_id="once")
    held = server.registry.statistics()
    again = raw.create(request_id="once")
    assert again.session.session_id == first.session.session_id
    assert again.attach_token == first.attach_token
    assert server.registry.statistics() == held


def test_a_creation_sent_by_many_at_once_makes_one_session(server, connect) -> None:
    clients = [RawClient(server.target) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        created = list(pool.map(lambda client: client.create(request_id="once"), clients))
    for client in clients:
        client.close()
    assert len({answer.session.session_id for answer in created}) == 1
    assert server.registry.statistics().sessions == 1


def test_a_creation_repeated_after_steps_finds_the_session_as_it_is(raw, state) -> None:
    first = raw.create(_SIZE, request_id="once")
    held = first.session.session_id, first.attach_token
    raw.step(*held, 1, gradient(1))
    before = state(held)
    again = raw.create(_SIZE, request_id="once")
    assert (again.session.session_id, again.session.applied_step) == (held[0], 1)
    assert same_bits(state(held), before)


def test_another_config_under_the_same_request_id_is_refused(raw, server) -> None:
    raw.create(request_id="once")
    held = server.registry.statistics()
    with pytest.raises(Refused) as refused:
        raw.create(request_id="once", lr=0.5)
    assert refused.value.row == ("INVALID_ARGUMENT", "INVALID_CONFIG")
    assert refused.value.metadata == {"field": "request_id"}
    assert server.registry.statistics() == held


def test_a_request_id_is_free_again_when_its_session_has_ended(raw) -> None:
    first = raw.create(request_id="once").session.session_id
    raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=first))
    assert raw.create(request_id="once", lr=0.5).session.session_id != first


# --- loads that their client gave up -----------------------------------------------------------------------


@pytest.fixture
def connect_through(proxy: Proxy, exits: contextlib.ExitStack) -> Callable[[], stepwire.Client]:
    """Open real clients that give up while the network leads nowhere, and repeat their calls while it does."""
    retry = stepwire.Retry(uniform=lambda low, high: 3600.0 if proxy.upstream is None else 0.001)
    transport = "uds" if proxy.target.startswith("unix:") else "tcp"
    return lambda: exits.enter_context(stepwire.connect(proxy.target, transport=transport, retry=retry))


def test_a_load_after_one_that_failed_is_never_taken_for_it(
    server: Server, proxy: Proxy, connect: Callable[[str], stepwire.Client]
) -> None:
    """The first load was committed and its answer lost; the second brings other parameters, and they count."""
    session = SMALL.create(connect(proxy.target))
    proxy.hold("down")
    with pytest.raises(stepwire.DeadlineExceededError):
        session.load(SMALL.gradient(1), timeout=0.3)
    proxy.release("down")
    session.load(SMALL.gradient(2))
    assert bits(session.pull()) == bits(SMALL.gradient(2))
    session.load(SMALL.gradient(3))
    assert bits(session.pull()) == bits(SMALL.gradient(3))


def test_a_load_that_failed_and_arrives_after_a_step_changes_nothing(
    server: Server, proxy: Proxy, connect: Opened, connect_through: Callable[[], stepwire.Client]
) -> None:
    """The client gave the load up and went on; whoever catches its error knows the parameters that are stepped."""
    disturbed, calm = SMALL.create(connect_through()), SMALL.create(connect(server.target))
    for session in (disturbed, calm):
        session.step(SMALL.gradient(1))
    stranded = proxy.strand(messages=3)  # the opening, one chunk, the commit
    proxy.upstream = None
    with pytest.raises(stepwire.UnavailableError):
        disturbed.load(SMALL.parameters())
    proxy.upstream = server.target
    for session in (disturbed, calm):
        session.step(SMALL.gradient(2))
    assert stranded.deliver(lambda message: True) == []  # a refusal
    assert same_bits(disturbed.state(), calm.state())
    assert bits(disturbed.step(SMALL.gradient(3))) == bits(calm.step(SMALL.gradient(3)))


def test_a_load_after_a_step_that_failed_goes_on_from_where_the_session_is(
    server: Server, proxy: Proxy, connect_through: Callable[[], stepwire.Client]
) -> None:
    """The step was applied and its answer lost; instead of asking again, the client loads and goes on."""
    session = SMALL.create(connect_through())
    session.step(SMALL.gradient(1))
    stranded = proxy.strand(messages=1)
    proxy.upstream = None
    with pytest.raises(stepwire.UnavailableError):
        session.step(SMALL.gradient(2))
    assert not pb.AttachResponse.FromString(stranded.deliver(ends_the_answer)[-1]).result.replayed
    proxy.upstream = server.target
    session.load(SMALL.parameters())
    assert bits(session.pull()) == bits(SMALL.parameters())
    assert session.applied_step == 2
    session.step(SMALL.gradient(3))
    assert (session.applied_step, session.last_result.replayed, session.state().step) == (3, False, 3)


def test_a_step_that_was_given_up_and_arrives_after_a_load_changes_nothing(
    server: Server, proxy: Proxy, connect: Opened, connect_through: Callable[[], stepwire.Client]
) -> None:
    """Neither are the loaded parameters stepped by it, nor is the next gradient taken for its repetition."""
    disturbed, calm = SMALL.create(connect_through()), SMALL.create(connect(server.target))
    for session in (disturbed, calm):
        session.step(SMALL.gradient(1))
    stranded = proxy.strand(messages=1)
    proxy.upstream = None
    with pytest.raises(stepwire.UnavailableError):
        disturbed.step(SMALL.gradient(2))
    proxy.upstream = server.target
    for session in (disturbed, calm):
        session.load(SMALL.parameters())
    assert stranded.deliver(ends_the_answer) == []  # a refusal
    assert same_bits(disturbed.state(), calm.state())
    assert bits(disturbed.step(SMALL.gradient(3))) == bits(calm.step(SMALL.gradient(3)))
    assert disturbed.last_result is not None
    assert (disturbed.applied_step, disturbed.last_result.replayed) == (2, False)
