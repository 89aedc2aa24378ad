"""Deadlines: a call ends in time whatever the network does, and what it may have done is done once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import stepwire
from stepwire.errors import Reason
from stepwire_server.server import Server
from tests.integration.link import Direction
from tests.integration.proxy import Proxy
from tests.integration.training import SMALL, WIDE, Model, bits, same_bits

pytestmark = pytest.mark.many

Connect = Callable[[str], stepwire.Client]

_TIMEOUT_SECONDS = 0.3
# Far beyond any hiccup of a loaded machine, and far below the client's default timeout of these tests.
_LATEST_SECONDS = 10.0

models = pytest.mark.parametrize("model", [SMALL, WIDE], ids=lambda model: model.name)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """The block takes its timeout or less, and what a loaded machine adds."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < _LATEST_SECONDS


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, so that nobody else listens there, and that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that accepts connections and says nothing, ever."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        yield mute.getsockname()[1]


@models
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_step_that_is_not_answered_in_time_may_be_taken_again(
    server: Server, proxy: Proxy, connect: Connect, model: Model, direction: Direction
) -> None:
    disturbed, calm = model.create(connect(proxy.target)), model.create(connect(server.target))
    for session in (disturbed, calm):
        session.step(model.gradient(1))
    proxy.hold(direction)
    for _ in range(2):
        with in_time(), pytest.raises(stepwire.DeadlineExceededError) as late:
            disturbed.step(model.gradient(2), timeout=_TIMEOUT_SECONDS)
        assert late.value.reason == Reason.DEADLINE_EXCEEDED
        assert late.value.metadata == {"timeout_seconds": str(_TIMEOUT_SECONDS)}
        assert disturbed.applied_step == 1
    proxy.release(direction)
    for step in (2, 3):
        assert bits(disturbed.step(model.gradient(step))) == bits(calm.step(model.gradient(step)))
    assert same_bits(disturbed.state(), calm.state())


@models
def test_a_step_of_a_broken_connection_ends_in_time_and_may_be_taken_again(
    server: Server, proxy: Proxy, connect: Connect, model: Model
) -> None:
    disturbed, calm = model.create(connect(proxy.target)), model.create(connect(server.target))
    for session in (disturbed, calm):
        session.step(model.gradient(1))
    proxy.upstream = None
    proxy.sever()
    with in_time(), pytest.raises(stepwire.UnavailableError) as unreachable:
        disturbed.step(model.gradient(2), timeout=_TIMEOUT_SECONDS)
    assert unreachable.value.reason in {Reason.UNREACHABLE, Reason.DEADLINE_EXCEEDED}
    proxy.upstream = server.target
    assert bits(disturbed.step(model.gradient(2))) == bits(calm.step(model.gradient(2)))
    assert same_bits(disturbed.state(), calm.state())


def test_nobody_listens(closed_port: int, connect: Connect) -> None:
    client = connect(f"127.0.0.1:{closed_port}")
    with in_time(), pytest.raises(stepwire.UnavailableError) as unreachable:
        SMALL.create(client, timeout=_TIMEOUT_SECONDS)
    assert unreachable.value.reason in {Reason.UNREACHABLE, Reason.DEADLINE_EXCEEDED}


def test_somebody_listens_who_says_nothing(mute_port: int, connect: Connect) -> None:
    client = connect(f"127.0.0.1:{mute_port}")
    with in_time(), pytest.raises(stepwire.UnavailableError) as mute:
        client.info(timeout=_TIMEOUT_SECONDS)
    assert mute.value.reason in {Reason.UNREACHABLE, Reason.DEADLINE_EXCEEDED}


def test_attaching_to_a_server_that_fell_silent_ends_in_time(
    server: Server, mute_port: int, proxy: Proxy, connect: Connect
) -> None:
    session = SMALL.create(connect(proxy.target))
    proxy.upstream = f"127.0.0.1:{mute_port}"
    proxy.sever()
    for act in (session.attach, lambda timeout: session.step(SMALL.gradient(1), timeout=timeout), session.pull):
        with in_time(), pytest.raises(stepwire.UnavailableError):
            act(timeout=_TIMEOUT_SECONDS)
    proxy.upstream = server.target
    proxy.sever()
    session.step(SMALL.gradient(1))
    assert session.applied_step == 1


def test_a_deadline_that_passes_as_its_step_ends_does_not_fail_the_next_step(server: Server, connect: Connect) -> None:
    """The watchdog cancels a stream whose answer has just come; the next step is not late, and attaches again."""
    session = SMALL.create(connect(server.target))
    session.step(SMALL.gradient(1))
    watchdog = session._link.shards[0].hold._stream._watchdog
    watchdog.arm(0.0)
    watchdog._thread.join(_LATEST_SECONDS)
    assert watchdog.barked
    session.step(SMALL.gradient(2))
    assert (session.applied_step, session.last_result.replayed) == (2, False)


# --- threads -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_thread_stays() -> Iterator[None]:
    """Every thread of the client that the block starts ends by itself; those of the server's pools stay for others."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(("call", "commit")):
            thread.join(_LATEST_SECONDS)
            assert not thread.is_alive(), thread.name


def test_failed_attempts_leave_no_threads(server: Server, proxy: Proxy, connect: Connect) -> None:
    """Each attempt has a watchdog and a sender; they end with it, however many there were."""
    session = SMALL.create(connect(proxy.target))
    session.step(SMALL.gradient(1))
    with no_thread_stays():
        proxy.upstream = None
        proxy.sever()
        with pytest.raises(stepwire.UnavailableError):
            session.step(SMALL.gradient(2), timeout=_TIMEOUT_SECONDS)
        proxy.refused.wait(2)


def test_a_closed_client_leaves_no_threads(server: Server) -> None:
    """Though its sessions were neither closed nor detached."""
    with stepwire.connect(server.target) as warm:
        SMALL.create(warm).step(SMALL.gradient(1))
    with no_thread_stays():
        with stepwire.connect(server.target) as client:
            session = SMALL.create(client)
            session.step(SMALL.gradient(1))
        assert session.applied_step == 1
