"""Two clients on one session: the second holds it, the first is told, and nobody's step is lost or doubled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from tests.integration.probes import stream_ends
from tests.integration.training import TINY, bits, same_bits
from tests.support.raw import RawClient, Refused, step_message

Connect = Callable[[str], stepwire.Client]

ONES = np.ones(12, np.float32)


@pytest.fixture
def first(server: Server, connect: Connect) -> stepwire.Session:
    """The session's creator, after a step."""
    session = TINY.create(connect(server.target))
    session.step(TINY.gradient(1))
    return session


@pytest.fixture
def second(server: Server, connect: Connect, first: stepwire.Session) -> stepwire.Session:
    """Another client's end of the same session."""
    return connect(server.target).session(first.session_id)


def assert_fenced(act: Callable[[], object]) -> None:
    """The act is refused because another client holds the worker."""
    with pytest.raises(stepwire.FencedError) as refused:
        act()
    assert refused.value.reason == Reason.FENCED
    assert refused.value.metadata["worker"] == "0"


def test_a_second_client_fences_the_first(first, second) -> None:
    before = first.state()
    second.attach()
    for _ in range(2):  # it stays fenced
        assert_fenced(lambda: first.step(TINY.gradient(2)))
    assert same_bits(first.state(), before)
    assert first.applied_step == 1
    assert_fenced(lambda: first.load(TINY.parameters()))
    assert_fenced(first.attach)
    assert same_bits(first.state(), before)


def test_the_second_client_goes_on_where_the_first_was(first, second, client) -> None:
    calm = TINY.create(client)
    for step in (1, 2):
        expected = calm.step(TINY.gradient(step))
    assert bits(second.step(TINY.gradient(2))) == bits(expected)
    assert (second.applied_step, second.last_result.replayed) == (2, False)
    assert same_bits(second.state(), calm.state())


def test_the_first_client_takes_the_session_back(first, second, client) -> None:
    calm = TINY.create(client)
    second.step(TINY.gradient(2))
    second.step(TINY.gradient(3))
    first.attach(take_over=True)
    assert first.applied_step == 3
    assert_fenced(lambda: second.step(TINY.gradient(4)))
    for step in (1, 2, 3, 4):
        expected = calm.step(TINY.gradient(step))
    assert bits(first.step(TINY.gradient(4))) == bits(expected)
    assert same_bits(first.state(), calm.state())


def test_a_client_that_has_not_attached_yet_never_takes_anothers_step_for_its_own(first, second, client) -> None:
    """Between looking the session up and its first step, the other client steps; both gradients count."""
    calm = TINY.create(client)
    first.step(TINY.gradient(2))
    assert second.applied_step == 1  # as it was when it was looked up
    answer = second.step(TINY.gradient(3))
    assert not second.last_result.replayed
    assert second.applied_step == 3
    for step in (1, 2, 3):
        expected = calm.step(TINY.gradient(step))
    assert bits(answer) == bits(expected)
    assert same_bits(second.state(), calm.state())


def test_a_fenced_client_may_still_read(first, second) -> None:
    after = second.step(TINY.gradient(2))
    assert bits(first.pull()) == bits(after)
    assert first.info().applied_step == 2


def test_detaching_gives_nothing_up(first, second) -> None:
    first.detach()
    assert first.step(TINY.gradient(2)) is not None
    second.attach()
    second.detach()
    assert_fenced(lambda: first.step(TINY.gradient(3)))


# --- in plain messages -------------------------------------------------------------------------------------


def test_a_fenced_token_is_refused_in_every_call(raw: RawClient, client) -> None:
    created = raw.create()
    session, old = created.session.session_id, created.attach_token
    raw.step(session, old, 1, ONES)
    new = raw.attach(session).receive().opened.attach_token
    assert len({0, old, new}) == 3
    before = client.session(session).state()
    for token in (old, new ^ 1, 1, 2**64 - 1):
        for act in (
            lambda token=token: raw.step(session, token, 1, ONES),
            lambda token=token: raw.step(session, token, 2, ONES),
            lambda token=token: raw.attach(session, token).receive(),
            lambda token=token: raw.load(session, token, 1, ONES),
        ):
            with pytest.raises(Refused) as refused:
                act()
            assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")
            assert refused.value.metadata == {"worker": "0"}
    assert same_bits(client.session(session).state(), before)
    assert raw.step(session, new, 2, ONES).result.step == 2


def test_a_call_without_a_token_is_refused(raw: RawClient) -> None:
    session = raw.create().session.session_id
    with pytest.raises(Refused) as refused:
        raw.step(session, 0, 1, ONES)
    assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")


def test_a_stream_is_fenced_between_its_chunks(raw: RawClient, client) -> None:
    created = raw.create()
    session = created.session.session_id
    before = client.session(session).state()
    stream = raw.attach(session, created.attach_token)
    stream.receive()
    stream.send(step_message(1, ONES, slice(0, 6), commit=False))
    raw.attach(session).receive()
    stream.send(step_message(1, ONES, slice(6, 12), begin=False))
    with pytest.raises(Refused) as refused:
        stream.receive()
    assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")
    assert same_bits(client.session(session).state(), before)


def test_another_epoch_is_refused_in_every_call(raw: RawClient, client) -> None:
    created = raw.create()
    session, token, epoch = created.session.session_id, created.attach_token, created.session.epoch
    before = client.session(session).state()
    stream = raw.attach(session, token)
    stream.receive()
    token = stream.token
    for act in (
        lambda: raw.attach(session, token, epoch=epoch + 1).receive(),
        lambda: raw.step(session, token, 1, ONES, epoch=epoch + 1),
        lambda: raw.load(session, token, 1, ONES, epoch=epoch + 1),
        lambda: stream.step(step_message(1, ONES, epoch=epoch + 1)),
    ):
        with pytest.raises(Refused) as refused:
            act()
        assert refused.value.row == ("FAILED_PRECONDITION", "STALE_EPOCH")
        assert refused.value.metadata == {"epoch": str(epoch), "actual_epoch": str(epoch + 1)}
    assert same_bits(client.session(session).state(), before)
    assert raw.step(session, token, 1, ONES, epoch=epoch).result.epoch == epoch


def test_acquiring_a_worker_again_and_again_leaves_nothing_behind(raw: RawClient, server: Server) -> None:
    created = raw.create()
    session = created.session.session_id
    held = server.registry.statistics()
    ended = stream_ends(server.registry)
    streams, tokens = [], {0, created.attach_token}
    for _ in range(10):
        streams.append(raw.attach(session))
        tokens.add(streams[-1].receive().opened.attach_token)
    assert len(tokens) == 12
    for stream in streams:
        stream.cancel()
    ended.wait(len(streams))
    assert server.registry.statistics() == held
    answer: pb.GetSessionResponse = raw.call("GetSession", pb.GetSessionRequest(session_id=session))
    assert not answer.session.attached
