"""The link to one server: the numbers that go along, and another epoch, against servers that follow scripts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.arrays.packing import Packer
from stepwire.connection.channel import Calls
from stepwire.connection.stream import AttachedStream
from stepwire.errors import DeadlineExceededError, FencedError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.links import hold as hold_module
from stepwire.links.link import Load
from stepwire.links.remote import RemoteLink
from stepwire.steps.call import StepCall
from stepwire.steps.description import SessionDescription
from stepwire.transports import attach as attach_module
from stepwire.transports.route import Route, Router
from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32
from tests.client.links.made_sessions import ONES, Create, first
from tests.support.attach_scripts import Script, Server, answer, opened, refuse, serve_steps
from tests.support.ends import all_made
from tests.support.lost_replies import lost_replies
from tests.support.raw import RawClient


@pytest.fixture
def raw(target: str) -> Iterator[RawClient]:
    with RawClient(target) as client:
        yield client


PACKER = Packer(place([TensorSpec("w", (5,))], 1))


def make_link(calls: Calls, *, durable_step: int = 0, token: int = 7) -> RemoteLink:
    session = session_pb2.Session(
        session_id="s", epoch=1, applied_step=3, applied_load=1, durable_step=durable_step, ready=True
    )
    session.config.optimizer.rule = optimizer_pb2.RULE_SGD
    return RemoteLink(Route(Router(calls, "tcp"), "s"), SessionDescription(session, PACKER, 1 << 16), token)


def call(value: float = 1.0, **fields: Any) -> StepCall:
    gradient = [np.full(5, value, np.float32)]
    return StepCall(step_pb2.StepBegin(**fields), gradient, FLOAT32, [np.zeros(5, np.float32)], FLOAT32)


def step(link: RemoteLink, made: StepCall) -> int:
    return link.step(made, link.deadline(30.0)).step


def begins(received: list[pb.AttachRequest]) -> list[tuple[int, int, int]]:
    return [(each.begin.step, each.begin.epoch, each.begin.load) for each in received if each.HasField("begin")]


def test_a_step_brings_the_epoch_and_the_load_that_its_client_knows(scripted: Any, scripted_calls: Calls) -> None:
    server, link = Server(scripted, serve_steps(3)), make_link(scripted_calls)
    assert [step(link, call()), step(link, call(2.0))] == [4, 5]
    link.detach()
    assert begins(server.received[0]) == [(4, 1, 1), (5, 1, 1)]
    assert all(each.begin.HasField("load") for each in server.received[0] if each.HasField("begin"))


def test_attaching_names_the_largest_durable_step_that_was_seen(scripted: Any, scripted_calls: Calls) -> None:
    def durable(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        yield opened(3)
        next(requests)
        response = answer(4)
        response.result.durable_step = 3
        yield response

    server, link = Server(scripted, durable, serve_steps(4)), make_link(scripted_calls, durable_step=2)
    step(link, call())
    assert link.statistics().durable_step == 3
    link.detach()
    step(link, call(2.0))
    link.detach()
    assert [received[0].open.durable_step for received in server.received] == [2, 3]
    assert link.statistics().streams_opened == 2


def in_another_epoch(epoch: int) -> Script:
    """Refuse the step, or the stream, as a server does whose session has moved to another epoch."""

    def script(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        opening = next(requests).open
        if opening.epoch not in (0, epoch):
            raise FencedError("stale", reason=Reason.STALE_EPOCH)
        response = opened(3)
        response.opened.epoch = epoch
        yield response
        for request in requests:
            if request.HasField("commit"):
                yield answer(4)

    return script


def refusing_step(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
    next(requests)
    yield opened(3)
    next(requests)
    raise FencedError("stale", reason=Reason.STALE_EPOCH)


@pytest.mark.parametrize("scripts", [[in_another_epoch(2)], [refusing_step]], ids=["at attach", "at the step"])
def test_a_session_goes_on_in_another_epoch(scripted: Any, scripted_calls: Calls, scripts: list[Script]) -> None:
    server, link = Server(scripted, *scripts, in_another_epoch(2)), make_link(scripted_calls)
    assert step(link, call()) == 4
    link.detach()
    assert [received[0].open.epoch for received in server.received] == [1, 0]
    assert begins(server.received[1]) == [(4, 2, 1)]


def test_an_epoch_that_changes_all_the_time_is_told(scripted: Any, scripted_calls: Calls) -> None:
    Server(scripted, refusing_step, refusing_step)
    link = make_link(scripted_calls)
    with pytest.raises(FencedError) as refused:
        step(link, call())
    assert refused.value.reason == Reason.STALE_EPOCH


def test_a_load_in_another_epoch_is_sent_again(scripted: Any, scripted_calls: Calls) -> None:
    openings = []

    def load(messages: Iterator[bytes], context: Any) -> bytes:
        openings.append(pb.LoadRequest.FromString(next(messages)).open)
        list(messages)
        if openings[-1].epoch != 2:
            refuse(context, FencedError("stale", reason=Reason.STALE_EPOCH))
        return pb.LoadResponse(session=session_pb2.Session(applied_step=3, applied_load=2)).SerializeToString()

    scripted.on("Load", load)
    Server(scripted, in_another_epoch(2))
    link = make_link(scripted_calls)
    link.load(Load({"param": [np.zeros(5, np.float32)]}), link.deadline(30.0))
    link.detach()
    assert [(opening.epoch, opening.load, opening.step) for opening in openings] == [(1, 2, 3), (2, 2, 3)]


def test_a_session_that_was_loaded_by_another_client_is_not_stepped(scripted: Any, scripted_calls: Calls) -> None:
    server, link = Server(scripted, serve_steps(3, load=4)), make_link(scripted_calls)
    with pytest.raises(stepwire.StepMismatchError, match="loaded without this client") as refused:
        step(link, call())
    assert refused.value.metadata == {"applied_load": "4", "load": "1"}
    assert len(server.received[0]) == 1


def test_a_load_in_doubt_that_was_committed_is_what_the_next_step_follows_on(
    scripted: Any, scripted_calls: Calls
) -> None:
    def lost(messages: Iterator[bytes], context: Any) -> bytes:
        list(messages)
        refuse(context, DeadlineExceededError("late"))
        return b""

    scripted.on("Load", lost)
    server, link = Server(scripted, serve_steps(3, load=2)), make_link(scripted_calls)
    with pytest.raises(DeadlineExceededError):
        link.load(Load({"param": [np.zeros(5, np.float32)]}), link.deadline(30.0))
    assert step(link, call()) == 4
    link.detach()
    assert begins(server.received[0]) == [(4, 1, 2)]


def test_the_next_step_follows_on_the_step_of_a_state_whose_load_was_in_doubt(
    scripted: Any, scripted_calls: Calls
) -> None:
    def lost(messages: Iterator[bytes], context: Any) -> bytes:
        list(messages)
        refuse(context, DeadlineExceededError("late"))
        return b""

    scripted.on("Load", lost)
    server, link = Server(scripted, serve_steps(9, load=2)), make_link(scripted_calls)
    with pytest.raises(DeadlineExceededError):
        link.load(Load({"param": [np.zeros(5, np.float32)]}, step=9), link.deadline(30.0))
    assert step(link, call()) == 10
    link.detach()
    assert begins(server.received[0]) == [(10, 1, 2)]


def test_a_load_in_doubt_that_was_committed_ends_an_older_doubt(scripted: Any, scripted_calls: Calls) -> None:
    """The gradient acts on what was loaded; the reply of its first step is about parameters that were replaced."""

    def lost(messages: Iterator[bytes], context: Any) -> bytes:
        list(messages)
        refuse(context, DeadlineExceededError("late"))
        return b""

    scripted.on("Load", lost)
    server, link = Server(scripted, serve_steps(3), serve_steps(4), serve_steps(4, load=2)), make_link(scripted_calls)
    with lost_replies(), pytest.raises(stepwire.UnavailableError):
        step(link, call())
    with pytest.raises(DeadlineExceededError):
        link.load(Load({"param": [np.zeros(5, np.float32)]}), link.deadline(30.0))
    assert step(link, call()) == 5
    link.detach()
    assert begins(server.received[2]) == [(5, 1, 2)]


def test_another_gradient_after_a_half_applied_step_is_refused(scripted: Any, scripted_calls: Calls) -> None:
    def half(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        response = opened(3)
        response.opened.unfinished_step = 4
        yield response
        for request in requests:
            if request.HasField("commit"):
                yield answer(4)

    Server(scripted, serve_steps(3), half, half)
    link = make_link(scripted_calls)
    with lost_replies(), pytest.raises(stepwire.UnavailableError):
        link.step(call(overlap=True), link.deadline(30.0))
    with pytest.raises(stepwire.SessionNotReadyError) as refused:
        step(link, call(2.0, overlap=True))
    assert refused.value.reason == Reason.STEP_UNFINISHED
    assert step(link, call(overlap=True)) == 4
    link.detach()


def test_a_step_of_another_holder_is_not_taken_for_ones_own(scripted: Any, scripted_calls: Calls) -> None:
    """Its number is that of the next step, which this client has not sent."""
    server, link = Server(scripted, serve_steps(4)), make_link(scripted_calls)
    with pytest.raises(stepwire.StepMismatchError):
        step(link, call())
    assert len(server.received[0]) == 1
    assert server.received[0][0].open == attach_pb2.AttachOpen(
        session_id="s", attach_token=7, epoch=1, transport=server.received[0][0].open.transport
    )


def test_a_load_after_an_attach_that_failed_learns_its_token_first(create: Create) -> None:
    """The server had given out another token, and the reply with it was lost."""
    session = create()
    session.step(ONES)
    session.detach()
    with pytest.MonkeyPatch.context() as patched:
        open_stream = hold_module.open_stream

        def lost(*arguments: Any) -> Any:
            open_stream(*arguments)[0].close()
            raise DeadlineExceededError("the reply was lost")

        patched.setattr(hold_module, "open_stream", lost)
        with pytest.raises(DeadlineExceededError):
            session.attach()
    session.load({"w": np.full(3, 10.0, np.float32)})
    assert first(session.step(ONES)) == 9.0


def test_a_load_under_a_stream_that_was_displaced_attaches_again(create: Create, raw: RawClient) -> None:
    """As after an attach of this client that reached the server late."""
    session = create()
    session.step(ONES)
    late = raw.attach(session.session_id, session._link.shards[0].hold.token)
    late.receive()
    session.load({"w": np.full(3, 10.0, np.float32)})
    assert first(session.pull()) == 10.0
    assert first(session.step(ONES)) == 9.0
    assert session.statistics().streams_opened == 2


def test_a_step_that_another_client_left_half_applied_is_not_gone_on_with(scripted: Any, scripted_calls: Calls) -> None:
    """Its number and its options are those of the next step, and its gradient is not."""

    def half(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        response = opened(3)
        response.opened.unfinished_step = 4
        yield response
        list(requests)

    server, link = Server(scripted, half), make_link(scripted_calls, token=0)
    with pytest.raises(stepwire.SessionNotReadyError, match="step 4 was sent with overlap") as refused:
        link.step(call(overlap=True), link.deadline(30.0))
    assert refused.value.reason == Reason.STEP_UNFINISHED
    link.detach()
    assert begins(server.received[0]) == []


def test_a_pull_that_loses_the_connection_while_a_step_attaches_disturbs_no_step(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create()

    class Meanwhile(AttachedStream):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            monkeypatch.undo()
            monkeypatch.setattr(Calls, "download", unreachable)
            with pytest.raises(stepwire.UnavailableError):
                session.pull()
            monkeypatch.undo()

    def unreachable(*arguments: Any) -> Any:
        later = 1e9  # after any deadline, so that the pull is not repeated
        raise stepwire.UnavailableError("broken", reason=Reason.UNREACHABLE, retry_after_seconds=later)

    monkeypatch.setattr(attach_module, "AttachedStream", Meanwhile)
    assert first(session.step(ONES)) == -1.0
    assert session.statistics().streams_opened == 1
    assert session.transport is not None


def test_dropped_sessions_leave_no_streams(target: str) -> None:
    """Each stream ends with its session, and the session on the server waits for its next client."""
    with stepwire.connect(target, timeout=120.0, transport="tcp") as client:
        ids = []
        for _ in range(3):
            session = client.create_session({"w": np.zeros(3, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
            session.step(ONES)
            ids.append(session.session_id)
            stream = weakref.ref(session._link.shards[0].hold._stream)  # type: ignore[attr-defined]
            del session
            gc.collect()
            all_made()
            assert stream() is None
        for each in ids:
            found = client.session(each)
            assert first(found.step(ONES)) == -2.0
            found.close()
