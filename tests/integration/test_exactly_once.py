"""Steps that are repeated, delayed, reordered or misnumbered: applied once, or refused by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from tests.integration.probes import chunks_staged
from tests.integration.proxy import Proxy
from tests.integration.training import SMALL, WIDE, bits, same_bits, telemetry
from tests.support.raw import RawClient, RawStream, Refused, Vector, commit, settle, step_message

_SIZE = 12
_SEED = 77

Held = tuple[str, int]
"""A session's id and the token of its worker."""

DISPLACED = ("UNAVAILABLE", "STREAM_DISPLACED")


def gradient(step: int) -> Vector:
    """Return the gradient of a step, the same whenever it is asked for."""
    return np.random.default_rng((_SEED, step)).standard_normal(_SIZE, np.float32)


@pytest.fixture
def session(raw: RawClient) -> Held:
    """A session that starts at zeros."""
    created = raw.create(_SIZE)
    return created.session.session_id, created.attach_token


@pytest.fixture
def state(client: stepwire.Client) -> Callable[[Held], stepwire.Snapshot]:
    """Read all of a session's state."""
    return lambda held: client.session(held[0]).state()


@pytest.fixture
def expected(raw: RawClient, state: Callable[[Held], stepwire.Snapshot]) -> Callable[[int], stepwire.Snapshot]:
    """Return the state after so many steps, each sent once."""

    def after(steps: int) -> stepwire.Snapshot:
        created = raw.create(_SIZE)
        for step in range(1, steps + 1):
            raw.step(created.session.session_id, created.attach_token, step, gradient(step))
        return state((created.session.session_id, created.attach_token))

    return after


# --- steps in one call -------------------------------------------------------------------------------------


def test_a_step_sent_twice_is_answered_twice_and_applied_once(raw, session, state, expected) -> None:
    first, again = (raw.step(*session, 1, gradient(1)) for _ in range(2))
    assert (first.result.replayed, again.result.replayed) == (False, True)
    assert again.payload == first.payload
    assert again.result.telemetry == first.result.telemetry
    assert same_bits(state(session), expected(1))


def test_a_replay_needs_no_gradient_and_applies_none(raw, session, state, expected) -> None:
    first = raw.step(*session, 1, gradient(1))
    again = raw.step(*session, 1, gradient(2))
    assert (again.payload, again.result.replayed) == (first.payload, True)
    assert same_bits(state(session), expected(1))


def test_a_step_sent_by_many_at_once_is_applied_by_one(raw, session, state, expected) -> None:
    for step in range(1, 21):
        answers = [settle(one) for one in [raw.step_later(*session, step, gradient(step)) for _ in range(8)]]
        assert sorted(answer.result.replayed for answer in answers) == [False] + [True] * 7
        assert len({answer.payload for answer in answers}) == 1
        assert len({answer.result.telemetry.SerializeToString() for answer in answers}) == 1
    assert same_bits(state(session), expected(20))


def test_steps_out_of_order_are_refused_until_their_turn(raw, session, state, expected) -> None:
    with pytest.raises(Refused) as early:
        raw.step(*session, 2, gradient(2))
    assert early.value.row == ("ABORTED", "STEP_MISMATCH")
    raw.step(*session, 1, gradient(1))
    raw.step(*session, 2, gradient(2))
    with pytest.raises(Refused) as late:
        raw.step(*session, 1, gradient(1))
    assert late.value.row == ("ABORTED", "STEP_SUPERSEDED")
    assert same_bits(state(session), expected(2))


def test_a_storm_of_repeated_late_and_early_steps(raw, session, state, expected) -> None:
    """Each step is sent among others of its neighbourhood; whoever comes in time applies it, and only once."""
    chance = random.Random(_SEED)
    applied = 0
    for step in range(1, 41):
        numbers = [step, *(max(1, step + chance.randint(-3, 3)) for _ in range(5))]
        chance.shuffle(numbers)
        for number, one in [(number, raw.step_later(*session, number, gradient(number))) for number in numbers]:
            try:
                applied += not settle(one).result.replayed
            except Refused as refused:
                assert refused.row in {("ABORTED", "STEP_MISMATCH"), ("ABORTED", "STEP_SUPERSEDED")}, number
    last = state(session).step
    assert applied == last >= 40
    assert same_bits(state(session), expected(last))


# --- delayed streams ---------------------------------------------------------------------------------------


@pytest.fixture
def behind(proxy: Proxy) -> Iterator[RawClient]:
    """A raw client behind the network that delays it."""
    with RawClient(proxy.target) as client:
        yield client


def halves(step: int) -> list[pb.AttachRequest]:
    """Return a step in three messages: two chunks and the commit."""
    middle = _SIZE // 2
    return [
        step_message(step, gradient(step), slice(0, middle), commit=False),
        step_message(step, gradient(step), slice(middle, _SIZE), begin=False, commit=False),
        commit(),
    ]


def attached(client: RawClient, session: Held) -> RawStream:
    """Attach with the session's token, as a client that comes back."""
    stream = client.attach(*session)
    stream.receive()
    assert stream.token not in (0, session[1])
    return stream


@pytest.mark.many
@pytest.mark.parametrize("sent_in_time", [0, 1, 2])
@pytest.mark.parametrize("steps_meanwhile", [1, 2, 5])
def test_a_delayed_step_of_an_older_stream_is_refused(
    raw, behind, proxy, server, session, state, expected, sent_in_time: int, steps_meanwhile: int
) -> None:
    """The delayed stream sends step 1, whole or but for its first messages, after a newer stream has gone on."""
    messages = halves(1)
    late = attached(behind, session)
    if sent_in_time:
        staged = server.registry.get(session[0])
        arrived = chunks_staged(staged)
        for message in messages[:sent_in_time]:
            late.send(message)
        arrived.wait(sent_in_time)
    proxy.hold("up")
    for message in messages[sent_in_time:]:
        late.send(message)
    proxy.wait_held("up")

    on_time = attached(raw, (session[0], late.token))
    results = [on_time.step(step_message(step, gradient(step))) for step in range(1, steps_meanwhile + 1)]
    assert [result.replayed for result in results] == [False] * steps_meanwhile

    proxy.release("up")
    with pytest.raises(Refused) as refused:
        late.receive()
    assert refused.value.row == DISPLACED
    assert refused.value.metadata == {"worker": "0"}
    assert same_bits(state(session), expected(steps_meanwhile))
    assert on_time.step(step_message(steps_meanwhile + 1, gradient(steps_meanwhile + 1))).step == steps_meanwhile + 1


@pytest.mark.parametrize("steps_meanwhile", [1, 2, 5])
def test_a_delayed_call_is_a_replay_or_superseded(
    raw, behind, proxy, session, state, expected, steps_meanwhile: int
) -> None:
    """The delayed call brings step 1 after another one with the same token has brought it, and gone on."""
    behind.info()  # its connection is there
    proxy.hold("up")
    late = behind.step_later(*session, 1, gradient(1))
    proxy.wait_held("up")
    answers = [raw.step(*session, step, gradient(step)) for step in range(1, steps_meanwhile + 1)]
    assert [answer.result.replayed for answer in answers] == [False] * steps_meanwhile

    proxy.release("up")
    if steps_meanwhile == 1:
        answer = settle(late)
        assert answer.result.replayed
        assert answer.result.telemetry == answers[0].result.telemetry
        assert np.frombuffer(answer.payload, np.float32).tobytes() == state(session).slots["param"]["w"].tobytes()
    else:
        with pytest.raises(Refused) as refused:
            settle(late)
        assert refused.value.row == ("ABORTED", "STEP_SUPERSEDED")
        assert refused.value.metadata == {"expected_step": str(steps_meanwhile + 1), "actual_step": "1"}
    assert same_bits(state(session), expected(steps_meanwhile))


@pytest.mark.parametrize("first", ["older", "newer"])
def test_of_two_streams_with_one_step_the_newer_applies_it(raw, server, session, state, expected, first: str) -> None:
    """Whichever commits first: the older one was displaced in the middle of its step."""
    arrived = chunks_staged(server.registry.get(session[0]))
    older = attached(raw, session)
    for message in halves(1)[:2]:
        older.send(message)
    arrived.wait(2)
    newer = attached(raw, (session[0], older.token))
    for message in halves(1)[:2]:
        newer.send(message)
    arrived.wait(2)
    if first == "newer":
        assert not newer.step(commit()).replayed
    with pytest.raises(Refused) as refused:
        older.step(commit())
    assert refused.value.row == DISPLACED
    if first == "older":
        assert not newer.step(commit()).replayed
    assert same_bits(state(session), expected(1))


def test_a_third_stream_ends_the_first_that_stayed_silent(raw, session) -> None:
    first, second, third = (attached(raw, session) for _ in range(3))
    with pytest.raises(Refused) as refused:
        first.receive()
    assert refused.value.code == "CANCELLED"
    assert third.step(step_message(1, gradient(1))).step == 1
    with pytest.raises(Refused) as refused:
        second.step(step_message(1, gradient(1)))
    assert refused.value.row == DISPLACED
    assert attached(raw, (session[0], third.token)).step(step_message(1, gradient(1))).replayed


def ends_the_answer(message: bytes) -> bool:
    """Tell whether a message from the server is the last of an answer to a step."""
    return pb.AttachResponse.FromString(message).HasField("result")


@pytest.mark.parametrize("model", [SMALL, WIDE], ids=lambda model: model.name)
def test_what_a_client_gave_up_on_arrives_late_and_changes_nothing(
    server: Server, proxy: Proxy, connect: Callable[[str], stepwire.Client], model
) -> None:
    """The real client's connection breaks with a whole step on its way, and the first copy arrives long after.

    Meanwhile the client has repeated the step on a new connection, and gone on.
    """
    numbers = itertools.count(1)
    disturbed, calm = model.create(connect(proxy.target)), model.create(connect(server.target))

    def both() -> None:
        step = next(numbers)
        assert bits(disturbed.step(model.gradient(step))) == bits(calm.step(model.gradient(step)))
        assert telemetry(disturbed.last_result) == telemetry(calm.last_result)

    for meanwhile in (0, 1, 3, 0, 2):
        both()
        with proxy.recording() as traffic:
            both()
        stranded = proxy.strand(len(traffic["up"].messages))
        both()
        for _ in range(meanwhile):
            both()
        assert stranded.deliver(ends_the_answer) == []  # a refusal: the client has a newer stream
        assert same_bits(disturbed.state(), calm.state())


# --- numbers -----------------------------------------------------------------------------------------------


Way = tuple[int, Callable[[int], object]]
"""The newest token, and the way to bring a step."""


def step_in_a_call(raw: RawClient, session: Held) -> Way:
    return session[1], lambda step: raw.step(*session, step, gradient(1))


def step_on_a_stream(raw: RawClient, session: Held) -> Way:
    stream = attached(raw, session)
    return stream.token, lambda step: stream.step(step_message(step, gradient(1)))


@pytest.mark.many
@pytest.mark.parametrize("way", [step_in_a_call, step_on_a_stream])
@pytest.mark.parametrize(
    ("applied", "step", "reason"),
    [
        (0, 0, "STEP_SUPERSEDED"),
        (0, 2, "STEP_MISMATCH"),
        (0, 2**63, "STEP_MISMATCH"),
        (0, 2**64 - 1, "STEP_MISMATCH"),
        (3, 0, "STEP_SUPERSEDED"),
        (3, 1, "STEP_SUPERSEDED"),
        (3, 2, "STEP_SUPERSEDED"),
        (3, 5, "STEP_MISMATCH"),
        (3, 2**63, "STEP_MISMATCH"),
        (3, 2**64 - 1, "STEP_MISMATCH"),
    ],
)
def test_a_number_that_is_not_next(raw, session, state, way, applied: int, step: int, reason: str) -> None:
    for number in range(1, applied + 1):
        raw.step(*session, number, gradient(number))
    before = state(session)
    token, bring = way(raw, session)
    with pytest.raises(Refused) as refused:
        bring(step)
    assert refused.value.row == ("ABORTED", reason)
    assert refused.value.metadata == {"expected_step": str(applied + 1), "actual_step": str(step)}
    assert refused.value.retry_after_seconds is None
    assert same_bits(state(session), before)
    assert raw.step(session[0], token, applied + 1, gradient(1)).result.step == applied + 1
