"""The link to one server: steps in doubt, numbers that go along, and another epoch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.arrays.packing import Packer
from stepwire.connection.channel import Calls
from stepwire.connection.stream import AttachedStream
from stepwire.errors import DeadlineExceededError, FencedError, Reason, StepMismatchError
from stepwire.layout import TensorSpec, place
from stepwire.links import hold as hold_module
from stepwire.links.link import Load
from stepwire.links.remote import RemoteLink
from stepwire.steps.call import StepCall
from stepwire.steps.description import SessionDescription
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.transports import attach as attach_module
from stepwire.transports.route import Route, Router
from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32
from tests.support.attach_scripts import Script, Server, answer, opened, refuse, serve_steps
from tests.support.ends import all_made
from tests.support.lost_replies import lost_replies
from tests.support.raw import RawClient

START = {"w": np.zeros(3, np.float32)}
ONES, TWOS, FOURS = ({"w": np.full(3, value, np.float32)} for value in (1.0, 2.0, 4.0))
Create = Callable[..., stepwire.Session]


@pytest.fixture
def create(client: stepwire.Client) -> Iterator[Create]:
    """Make sessions of SGD with rate 1: the parameters are minus the sum of the gradients."""
    made = []

    def created(**options: Any) -> stepwire.Session:
        made.append(client.create_session(START, **{"optimizer": stepwire.SGD(lr=1.0)} | options))
        return made[-1]

    yield created
    for session in made:
        session.close()


@pytest.fixture
def raw(target: str) -> Iterator[RawClient]:
    with RawClient(target) as client:
        yield client


def fail(session: stepwire.Session, gradient: Any, *, applied: bool, **options: Any) -> None:
    """Take a step whose outcome stays unknown."""
    with lost_replies(applied=applied), pytest.raises(DeadlineExceededError):
        session.step(gradient, **options)
    known = session.statistics()
    assert (known.step_in_doubt, known.reply_begun) == (session.applied_step + 1, applied)


def first(parameters: Any) -> float:
    return float(parameters["w"][0])


# --- steps in doubt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_is_the_same_step(create: Create, applied: bool) -> None:
    session = create()
    session.step(ONES)
    fail(session, TWOS, applied=applied)
    assert first(session.step({"w": TWOS["w"].copy()})) == -3.0
    assert session.last_result is not None
    assert (session.last_result.replayed, session.applied_step) == (applied, 2)
    assert session.statistics().step_in_doubt is None


@pytest.mark.parametrize(("applied", "step", "value"), [(True, 2, -3.0), (False, 1, -2.0)])
def test_another_gradient_is_another_step(create: Create, applied: bool, step: int, value: float) -> None:
    """It never gets the reply of the step that failed, and is applied itself."""
    session = create()
    fail(session, ONES, applied=applied)
    assert first(session.step(TWOS)) == value
    assert session.last_result is not None
    assert (session.last_result.replayed, session.applied_step) == (False, step)
    assert session.info().applied_step == step


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("other", [[0.0, 2.0, 1.0], [-1.0, -2.0, 0.0]], ids=["permuted", "negated"])
def test_a_gradient_of_the_same_bits_in_other_places_is_another_step(
    create: Create, applied: bool, other: list[float]
) -> None:
    session, gradient = create(), {"w": np.float32([1, 2, 0])}
    fail(session, gradient, applied=applied)
    stepped: Any = session.step({"w": np.float32(other)})
    assert stepped["w"].tolist() == (-np.float32(other) - applied * gradient["w"]).tolist()


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_with_other_options_is_another_step(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    assert first(session.step(ONES, lr=0.5)) == -0.5 - applied
    assert session.info().applied_step == 1 + applied


@pytest.mark.parametrize("applied", [True, False])
def test_the_reply_may_be_another_one(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    assert session.step(ONES, reply="none") == {}
    assert session.info().applied_step == 1


def test_a_step_may_fail_again_and_again(create: Create) -> None:
    session = create()
    for applied in (False, False, True, True):
        fail(session, ONES, applied=applied)
    assert first(session.step(ONES)) == -1.0
    fail(session, ONES, applied=True)
    fail(session, TWOS, applied=True)
    assert first(session.step(TWOS)) == -4.0
    assert session.info().applied_step == 3


def test_a_doubt_outlives_another_gradient_that_could_not_even_attach(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create()
    fail(session, ONES, applied=True)
    with monkeypatch.context() as patched:
        patched.setattr("stepwire.links.hold.open_stream", nobody)
        with pytest.raises(DeadlineExceededError):
            session.step(TWOS)
    assert first(session.step(ONES)) == -1.0
    assert session.last_result is not None and session.last_result.replayed


def nobody(*_: Any) -> Any:
    raise DeadlineExceededError("nobody there")


@pytest.mark.parametrize("applied", [True, False])
def test_attaching_tells_the_outcome_and_forgets_nothing(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    session.attach()
    assert session.applied_step == applied
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_a_load_settles_the_step_before_it(create: Create, applied: bool) -> None:
    session = create()
    fail(session, ONES, applied=applied)
    session.load({"w": np.full(3, 10.0, np.float32)})
    assert (session.applied_step, session.statistics().step_in_doubt) == (applied, None)
    assert first(session.step(ONES)) == 9.0
    assert session.info().applied_step == 1 + applied


@pytest.mark.parametrize("applied", [True, False])
def test_a_loaded_state_settles_the_step_before_it(create: Create, applied: bool) -> None:
    session = create()
    session.step(ONES)
    fail(session, TWOS, applied=applied)
    state = stepwire.Snapshot(5, {"param": {"w": np.full(3, 10.0, np.float32)}}, {"w": 5})
    session.load_state(state)
    assert session.applied_step == 5
    assert first(session.step(TWOS)) == 8.0
    assert session.info().applied_step == 6


@pytest.mark.parametrize(("applied", "value"), [(True, -3.0), (False, -2.0)])
def test_steps_in_the_background_are_no_exception(create: Create, applied: bool, value: float) -> None:
    session = create()
    with lost_replies(applied=applied):
        failed = session.step_async(ONES)
        assert isinstance(failed.exception(30.0), DeadlineExceededError)
    assert session.statistics().background_failures == 1
    assert first(session.step_async(TWOS).result(120.0)) == value
    assert session.statistics().steps_in_flight == 0


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_that_was_fed_is_repeated_by_its_gradient(create: Create, applied: bool) -> None:
    """As `stepwire.torch` does, whose backward pass had begun the step."""
    session, feed = create(), GradientFeed(["w"])
    with lost_replies(applied=applied):
        failed: Future[Any] = session.step_async({"w": np.empty(3, np.float32)}, feed=feed)
        feed.give("w", ONES["w"])
        feed.commit()
        assert isinstance(failed.exception(30.0), DeadlineExceededError)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


def test_a_step_that_was_given_up_leaves_no_doubt(create: Create) -> None:
    session, feed = create(), GradientFeed(["w"])
    given_up = session.step_async({"w": np.empty(3, np.float32)}, feed=feed)
    feed.give("w", ONES["w"])
    feed.abort()
    assert given_up.exception(30.0) is not None
    assert session.statistics().step_in_doubt is None
    assert first(session.step(TWOS)) == -2.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_the_same_gradient_after_another_client_stepped_is_refused(
    client: stepwire.Client, create: Create, applied: bool
) -> None:
    """The number of the step in doubt is of either client by now: its repetition could apply the gradient twice."""
    session = create()
    fail(session, ONES, applied=applied)
    client.session(session.session_id).step(TWOS)
    with pytest.raises(FencedError):
        session.step(ONES)
    session.attach(take_over=True)
    for _ in range(2):
        with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
            session.step(ONES)
    session.attach(take_over=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert session.info().applied_step == 1 + applied
    assert first(session.pull()) == -2.0 - applied
    assert first(session.step(ONES)) == -3.0 - applied


@pytest.mark.parametrize("settle", ["pull", "load", "step"])
def test_whoever_knows_the_present_state_may_send_any_gradient(
    client: stepwire.Client, create: Create, settle: str
) -> None:
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    session.attach(take_over=True)
    settled = {
        "pull": lambda: session.pull(),
        "load": lambda: session.load({"w": np.full(3, -3.0, np.float32)}),
        "step": lambda: session.step({"w": np.zeros(3, np.float32)}),
    }
    settled[settle]()
    assert first(session.step(ONES)) == -4.0


def test_a_gradient_that_certainly_was_not_applied_is_a_new_step(client: stepwire.Client, create: Create) -> None:
    """The other client held the worker and stepped nothing, so the number of the step in doubt is free."""
    session = create()
    fail(session, ONES, applied=False)
    client.session(session.session_id).attach()
    session.attach(take_over=True)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


def test_another_gradient_that_fails_after_it_changes_nothing(client: stepwire.Client, create: Create) -> None:
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    session.attach(take_over=True)
    fail(session, FOURS, applied=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert first(session.step(FOURS)) == -7.0
    assert first(session.step(ONES)) == -8.0


def test_a_take_over_whose_reply_is_lost_hides_the_outcome_as_well(client: stepwire.Client, create: Create) -> None:
    """The token is gone, and the next step acquires the worker by itself."""
    session = create()
    fail(session, ONES, applied=True)
    client.session(session.session_id).step(TWOS)
    with pytest.MonkeyPatch.context() as patched:
        open_stream = hold_module.open_stream

        def lost(route: Any, opening: Any, *arguments: Any) -> Any:
            open_stream(route, opening, *arguments)[0].close()
            raise DeadlineExceededError("the reply was lost")

        patched.setattr(hold_module, "open_stream", lost)
        with pytest.raises(DeadlineExceededError):
            session.attach(take_over=True)
    with pytest.raises(StepMismatchError, match="nobody can tell whether it was applied"):
        session.step(ONES)
    assert first(session.pull()) == -3.0


def test_a_worker_taken_back_from_nobody_keeps_the_doubt(create: Create) -> None:
    session = create()
    fail(session, ONES, applied=True)
    session.attach(take_over=True)
    assert first(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


@pytest.mark.parametrize("applied", [True, False])
def test_error_feedback_goes_on_as_if_the_reply_had_come(create: Create, applied: bool) -> None:
    options: Any = {"gradient_dtype": "int8", "error_feedback": True}
    disturbed, calm = create(**options), create(**options)
    gradients = [{"w": np.float32([1.0, 0.3, -0.7]) * scale} for scale in (1.0, 0.9, 0.8)]
    fail(disturbed, gradients[0], applied=applied)
    for gradient in gradients[1:]:
        disturbed.step(gradient)
    for gradient in gradients[0 if applied else 1 :]:
        calm.step(gradient)
    assert disturbed.pull()["w"].tobytes() == calm.pull()["w"].tobytes()  # type: ignore[call-overload]


# --- against scripts ---------------------------------------------------------------------------------------

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
