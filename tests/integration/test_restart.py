"""A server that dies: its sessions are gone for good, the client is told what it had, and nothing starts afresh."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator

import pytest

import stepwire
from stepwire.errors import Reason
from tests.integration.processes import ServerProcess
from tests.integration.proxy import Proxy
from tests.integration.training import TINY

pytestmark = pytest.mark.slow

Connect = Callable[[str], stepwire.Client]


@pytest.fixture
def first() -> Iterator[ServerProcess]:
    """The server that will die."""
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def second() -> Iterator[ServerProcess]:
    """The server that takes its place; it outlives a test."""
    with ServerProcess() as process:
        yield process


@pytest.fixture
def address(first: ServerProcess) -> Iterator[Proxy]:
    """The one address that clients know, whichever server is behind it: no port has to be free twice."""
    with Proxy(first.target) as proxy:
        yield proxy


def replace(first: ServerProcess, second: ServerProcess, address: Proxy) -> None:
    """Kill one server, and let the other stand at its address."""
    address.upstream = second.target
    first.kill()


def assert_lost(act: Callable[[], object], last_known_step: int) -> None:
    """The act finds no session, and says what the last acknowledged step was."""
    with pytest.raises(stepwire.SessionNotFoundError) as lost:
        act()
    assert lost.value.reason == Reason.SESSION_NOT_FOUND
    assert lost.value.metadata["last_known_step"] == str(last_known_step)
    assert f"the last step this client knows to be applied is {last_known_step}" in str(lost.value)


def test_a_killed_server_takes_its_sessions_with_it(first, second, address, connect: Connect) -> None:
    client = connect(address.target)
    session = TINY.create(client)
    for step in (1, 2, 3):
        session.step(TINY.gradient(step))
    before = client.info()
    replace(first, second, address)
    for _ in range(2):  # it is not created by asking again
        assert_lost(lambda: session.step(TINY.gradient(4)), 3)
    assert session.applied_step == 3
    for act in (session.state, session.pull, session.info, lambda: session.load(TINY.parameters())):
        with pytest.raises(stepwire.SessionNotFoundError):
            act()
    after = client.info()
    assert after.instance_id != before.instance_id
    assert (before.sessions, after.sessions) == (1, 0)
    session.close()  # closing what is gone is harmless

    again = TINY.create(client)
    assert again.step(TINY.gradient(1)) is not None
    assert (again.applied_step, again.last_result.replayed) == (1, False)
    assert_lost(lambda: session.step(TINY.gradient(4)), 3)
    again.close()


def test_a_step_whose_answer_died_with_the_server_is_not_counted(first, second, address, connect: Connect) -> None:
    """The server applied step 3 and answered; the answer is held in the network when the server dies."""
    session = TINY.create(connect(address.target))
    for step in (1, 2):
        session.step(TINY.gradient(step))
    address.hold("down")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.step, TINY.gradient(3))
        address.wait_held("down")
        replace(first, second, address)
        address.sever()
        assert_lost(answer.result, 2)
    assert session.applied_step == 2


def test_a_client_waits_for_a_server_that_comes_back_in_time(first, second, address, connect: Connect) -> None:
    """While nobody is at the address the client retries; then it hears the truth from the server that came."""
    session = TINY.create(connect(address.target))
    session.step(TINY.gradient(1))
    address.upstream = None
    first.kill()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.step, TINY.gradient(2))
        address.refused.wait(2)
        address.upstream = second.target
        assert_lost(answer.result, 1)
