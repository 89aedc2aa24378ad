"""Two clients on one session (facts: attack 20): the token names the present holder, steps count what is applied."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2

pytestmark = pytest.mark.many


@pytest.fixture
def server(lane_server: Any) -> Any:
    return lane_server


@pytest.fixture
def wire(wire_of_each_kind: Any) -> Any:
    return wire_of_each_kind


def test_a_client_that_acquires_the_worker_is_told_how_the_session_stands(live: Any, attach: Any) -> None:
    first = attach(live, live.token)
    first.step(2)
    second = attach(live)
    assert len({0, live.first_token, live.token, first.token, second.token}) == 5
    assert first.opened.applied_step == 1
    assert (second.opened.applied_step, second.opened.applied_load) == (2, 1)
    assert (second.opened.epoch, second.opened.ready, second.opened.transport_reason) == (1, True, "")


def test_a_displaced_client_is_fenced_with_its_next_message(live: Any, attach: Any, refusal: Any) -> None:
    first, second = attach(live, live.token), attach(live)
    refused = refusal(lambda: first.step(2), "FAILED_PRECONDITION", "FENCED", "held by another client")
    assert refused.metadata == {"worker": "0"}
    assert second.step(2).result.step == 2


def test_a_step_that_was_under_way_when_the_worker_was_acquired_leaves_no_trace(
    live: Any, attach: Any, until: Any, refusal: Any
) -> None:
    """The displaced client has sent all but its last chunk; the new one steps; then the last chunk comes."""
    before, reserved = live.fingerprint(), live.wire.reserved_bytes()
    first = attach(live, live.token)
    first.stream.send(live.frame(0, 200, begin=2))
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    second = attach(live)
    first.stream.send(live.frame(200, commit=True))
    refusal(first.stream.receive, "FAILED_PRECONDITION", "FENCED", "held by another client")
    assert (live.fingerprint(), live.wire.reserved_bytes()) == (before, reserved)
    assert second.step(2).result.replayed is False


def test_the_old_token_opens_nothing_any_more(live: Any, attach: Any, untouched: Any) -> None:
    attach(live)
    for call in (
        lambda: live.wire.stream("Attach", [live.opening()]),
        lambda: live.wire.unary("Step", live.unary_step(2)),
        lambda: live.load(live.load_opening(2), live.load_chunk(commit=True)),
    ):
        untouched(call, "FAILED_PRECONDITION", "FENCED", "held by another client")


def test_a_session_that_is_deleted_ends_its_streams(live: Any, attach: Any, until: Any, refusal: Any) -> None:
    reserved = live.wire.reserved_bytes()
    idle, busy = attach(live, live.token), attach(live, live.token)
    busy.stream.send(live.frame(0, 200, begin=2))
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    answer = live.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
    assert pb.DeleteSessionResponse.FromString(answer).applied_step == 1
    refusal(busy.stream.receive, "NOT_FOUND", "SESSION_NOT_FOUND", live.id)
    refusal(idle.stream.receive, "NOT_FOUND", "SESSION_NOT_FOUND", live.id)
    until(lambda: live.wire.reserved_bytes() == reserved - 3 * 4 * live.size)


def test_clients_that_fight_over_a_session_never_apply_a_step_twice(
    live: Any, make_live: Any, connect: Any, server: Any
) -> None:
    """Each acquires the worker, steps once, and loses the worker at some point.

    What was answered as applied was applied, what was fenced was not, and of what was cut off at most one gradient a
    step was: the gradients in order, in a session of one client, end in the same bits.
    """
    applied: dict[int, int] = {}
    cut_off: dict[int, set[int]] = {}
    refusals: list[tuple[str, str]] = []

    def fight(number: int) -> None:
        with connect(server.target) as wire:
            for attempt in range(30):
                seed, step, opening = 1000 * number + attempt, 0, wire.open()
                try:
                    opening.send(live.opening(attach_token=0))
                    step = pb.AttachResponse.FromString(opening.receive()).opened.applied_step + 1
                    opening.send(live.frame(begin=step, commit=True, payload=live.gradient(seed)))
                    answer = pb.AttachResponse.FromString(opening.receive()).result
                except Exception as refused:
                    refusals.append((refused.code, refused.reason))  # type: ignore[attr-defined]
                    if step and refusals[-1] == ("CANCELLED", ""):
                        cut_off.setdefault(step, set()).add(seed)
                else:
                    assert applied.setdefault(answer.step, seed) == seed
                    assert not answer.replayed
                opening.cancel()

    threads = [threading.Thread(target=fight, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = live.wire.get(live.id).applied_step
    assert len(applied) + len(refusals) == 90
    assert set(refusals) <= {("FAILED_PRECONDITION", "FENCED"), ("CANCELLED", "")}

    possible = [{applied[step]} if step in applied else cut_off[step] for step in range(2, last + 1)]
    assert len(applied) == sum(step in applied for step in range(2, last + 1))
    ended = live.wire.pull(live.id, "param", "exp_avg", "exp_avg_sq")[1]
    assert any(alone(live, make_live, seeds) == ended for seeds in itertools.product(*possible))


def alone(live: Any, make_live: Any, seeds: Iterable[int]) -> dict[str, bytes]:
    """Apply steps with these gradients in a session like `live` that nobody fights over."""
    session = make_live(live.wire, live.wire.create(live.wire.get(live.id).config))
    session.load(session.load_opening(1), session.load_chunk(commit=True))
    session.step(1)
    for step, seed in enumerate(seeds, 2):
        session.step(step, live.gradient(seed))
    values: dict[str, bytes] = session.wire.pull(session.id, "param", "exp_avg", "exp_avg_sq")[1]
    return values


def test_a_pull_that_a_step_overtakes_says_so(live: Any, refusal: Any, make_config: Any, make_live: Any) -> None:
    """Its chunks must be of one moment. 12 MB do not fit gRPC's window, so the server is at it when the step comes."""
    big = make_live(live.wire, live.wire.create(make_config((3_000_000,))))
    stream = big.wire.open("Pull")
    stream.send(pb.PullRequest(session_id=big.id, chunk_bytes=4096))
    header = pb.PullResponse.FromString(stream.receive()).header
    ranges = [(offset, min(16_000, big.size - offset)) for offset in range(0, big.size, 16_000)]
    (answer,) = big.attach(
        pb.AttachRequest(begin=step_pb2.StepBegin(step=1, reply={"mode": 2})),
        *(big.frame(offset, count, payload=bytes(4 * count)) for offset, count in ranges),
        pb.AttachRequest(commit=step_pb2.StepCommit()),
    )
    assert (header.step, answer.result.step) == (0, 1)

    def rest() -> None:
        while True:
            stream.receive()

    refused = refusal(rest, "ABORTED", "STATE_CHANGED", "moved from step 0, load 0 to step 1, load 0")
    assert refused.metadata == {"step": "0", "applied_step": "1"}
    big.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=big.id))
