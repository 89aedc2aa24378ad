"""Attaching again: each attach is a new hold, and nothing commits that began under an older one of the same client.

A client attaches again when its connection broke. Its older stream, call or load may still be on its way then, and must
not act on what the client does next. `live` has its second token, and has used it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.engines.cpu.state import CpuGradient
from tests.server.rpc.streams import COMMIT, step_messages

PATIENCE_SECONDS = 120.0
DISPLACED = ("UNAVAILABLE", "STREAM_DISPLACED")
FENCED = ("FAILED_PRECONDITION", "FENCED")
# The new holder: whether it is the same client, and the refusal of the older one.
NEW_HOLDERS = [pytest.param(True, DISPLACED, id="same_client"), pytest.param(False, FENCED, id="another_client")]


# --- tokens -----------------------------------------------------------------------------------------------------


def test_each_attach_gives_another_token_and_none_tells_how_many_there_were(live: Any, attach: Any) -> None:
    """One with the client's own token too."""
    tokens = [live.first_token, live.token, attach(live, live.token).token]
    tokens.append(attach(live, tokens[-1]).token)
    tokens.append(attach(live).token)
    assert len(set(tokens)) == 5 and min(tokens) > 1 << 32, "one in 2**32 tokens is that small"


def test_an_attach_whose_answer_was_lost_is_repeated_with_the_older_token(live: Any, attach: Any) -> None:
    older = live.token
    tokens = [attach(live, older).token for _ in range(3)]
    client = attach(live, tokens[1])
    assert len({older, client.token, *tokens}) == 5
    assert client.step(2).result.step == 2


def step_on_the_stream(client: Any) -> None:
    assert client.step(2).result.step == 2


def step_in_a_call(client: Any) -> None:
    live = client.live
    answer = live.wire.unary("Step", live.unary_step(2, attach_token=client.token))
    assert pb.StepResponse.FromString(answer).result.step == 2


def load_with_the_token(client: Any) -> None:
    live = client.live
    live.load(live.load_opening(2, attach_token=client.token), live.load_chunk(commit=True))


@pytest.mark.parametrize("use", [step_on_the_stream, step_in_a_call, load_with_the_token])
def test_every_token_of_a_client_attaches_until_another_one_acquires_the_worker(
    live: Any, attach: Any, refusal: Any, use: Callable[[Any], None]
) -> None:
    """A reply with a newer token may have been lost."""
    client = attach(live, live.token)
    use(client)
    tokens = [attach(live, token).token for token in (live.token, client.token, live.first_token)]
    attach(live, 0)
    before = live.fingerprint()
    for token in (live.first_token, live.token, client.token, *tokens):
        refusal(lambda token=token: attach(live, token), *FENCED, "held by another client")
    assert live.fingerprint() == before


@pytest.mark.parametrize("where", ["Step", "Load"])
def test_calls_need_the_newest_token(live: Any, attach: Any, untouched: Any, where: str) -> None:
    """An older one still attaches, and does nothing else."""
    older = live.token
    newer = attach(live, older)
    calls = {
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, attach_token=older)),
        "Load": lambda: live.load(live.load_opening(2, attach_token=older), live.load_chunk(commit=True)),
    }
    refused = untouched(calls[where], *DISPLACED, "held by a newer stream of this client")
    assert refused.metadata == {"worker": "0"}
    assert attach(live, older).token not in (older, newer.token)


# --- steps of an older stream -----------------------------------------------------------------------------------


def test_an_older_stream_of_the_same_client_steps_no_more(live: Any, attach: Any, untouched: Any) -> None:
    old = attach(live, live.token)
    new = attach(live, live.token)
    refused = untouched(lambda: old.step(2), *DISPLACED, "held by a newer stream of this client", "nothing was applied")
    assert refused.metadata == {"worker": "0"}
    assert not new.stream.over


def test_two_streams_of_one_client_cannot_apply_a_step_twice(live: Any, attach: Any, refusal: Any) -> None:
    """As after a broken connection whose old stream the server still believes in: the same step, sent again."""
    old, new = attach(live, live.token), attach(live, live.token)
    assert new.step(2, seed=5).result.replayed is False
    after = live.fingerprint()
    refusal(lambda: old.step(2, seed=6), *DISPLACED)
    assert live.fingerprint() == after
    again = attach(live, new.token).step(2, seed=6)
    assert again.result.replayed is True
    assert again.payload == live.wire.pull(live.id, "param")[1]["param"]
    assert live.fingerprint() == after


@pytest.mark.parametrize(("same_client", "refused"), NEW_HOLDERS)
def test_a_large_step_whose_commit_comes_after_the_attach_leaves_no_trace(
    large: Any, attach: Any, until: Any, refusal: Any, same_client: bool, refused: tuple[str, str]
) -> None:
    """All of its chunks are there; the commit is compared with the hold under the session's lock."""
    before, reserved = large.fingerprint(), large.wire.reserved_bytes()
    old = attach(large, large.token)
    *chunks, commit = step_messages(large, step_pb2.StepBegin(step=1))
    old.stream.send(*chunks)
    until(lambda: large.wire.reserved_bytes() == reserved + 4 * large.size)
    new = attach(large, old.token if same_client else 0)
    old.stream.send(commit)
    refusal(old.stream.receive, *refused)
    assert (large.fingerprint(), large.wire.reserved_bytes()) == (before, reserved)
    new.stream.send(*chunks, commit)
    assert new.receive().chunk.count > 0


@pytest.mark.parametrize(("same_client", "refused"), NEW_HOLDERS)
def test_a_step_that_began_before_its_twin_was_committed_is_refused(
    live: Any, attach: Any, until: Any, refusal: Any, same_client: bool, refused: tuple[str, str]
) -> None:
    """The same step on two streams at once: the second commit finds a newer hold, and its gradient is dropped."""
    reserved = live.wire.reserved_bytes()
    old = attach(live, live.token)
    old.stream.send(live.frame(0, 200, begin=2))
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    new = attach(live, old.token if same_client else 0)
    assert new.step(2).result.replayed is False
    after = live.fingerprint()
    old.stream.send(live.frame(200, commit=True))
    refusal(old.stream.receive, *refused)
    assert live.fingerprint() == after


@pytest.mark.parametrize(("same_client", "refused"), NEW_HOLDERS)
def test_an_overlapped_step_of_an_older_stream_goes_no_further(
    wire: Any, make_config: Any, make_live: Any, attach: Any, until: Any, refusal: Any, same_client: Any, refused: Any
) -> None:
    """The part that it has applied stays, and the new stream finishes the step."""
    treatment = optimizer_pb2.GradientTreatment(non_finite=optimizer_pb2.NON_FINITE_POLICY_ALLOW)
    halted, straight = (make_live(wire, wire.create(make_config((100,), gradient=treatment))) for _ in range(2))
    begin, gradient = step_pb2.StepBegin(step=1, overlap=True), straight.gradient(1)
    straight.attach(straight.frame(begin=begin, payload=gradient), COMMIT)
    old = attach(halted, halted.token)
    old.stream.send(halted.frame(0, 60, begin=begin, payload=gradient[:60]))
    assert old.receive().chunk.count == 60
    new = attach(halted, old.token if same_client else 0)
    assert (new.opened.applied_step, new.opened.unfinished_step) == (0, 1)
    old.stream.send(halted.frame(60, 40, payload=gradient[60:]), COMMIT)
    refusal(old.stream.receive, *refused)
    assert wire.get(halted.id).applied_step == 0
    new.stream.send(halted.frame(begin=begin, payload=gradient), COMMIT)
    while not (reply := new.receive()).HasField("result"):
        pass
    assert (reply.result.step, reply.result.replayed) == (1, False)
    slots = ("param", "exp_avg", "exp_avg_sq")
    assert wire.pull(halted.id, *slots)[1] == wire.pull(straight.id, *slots)[1]


# --- calls and loads of an older hold ---------------------------------------------------------------------------


@pytest.mark.parametrize(("same_client", "refused"), NEW_HOLDERS)
def test_a_unary_step_that_began_before_the_attach_leaves_no_trace(
    live: Any,
    attach: Any,
    refusal: Any,
    monkeypatch: pytest.MonkeyPatch,
    same_client: bool,
    refused: tuple[str, str],
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    put = CpuGradient.put

    def waiting(buffer: CpuGradient, *arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return put(buffer, *arguments)

    before, reserved = live.fingerprint(), live.wire.reserved_bytes()
    problems: list[Any] = []
    calling = threading.Thread(
        target=lambda: problems.append(refusal(lambda: live.wire.unary("Step", live.unary_step(2)), *refused))
    )
    monkeypatch.setattr(CpuGradient, "put", waiting)
    calling.start()
    assert inside.wait(PATIENCE_SECONDS)
    new = attach(live, live.token if same_client else 0)
    go_on.set()
    calling.join(PATIENCE_SECONDS)
    assert len(problems) == 1
    assert (live.fingerprint(), live.wire.reserved_bytes()) == (before, reserved)
    assert new.step(2).result.replayed is False


@pytest.mark.parametrize(("same_client", "refused"), NEW_HOLDERS)
def test_a_load_that_began_before_the_attach_leaves_no_trace(
    live: Any, attach: Any, until: Any, refusal: Any, same_client: bool, refused: tuple[str, str]
) -> None:
    before, reserved = live.fingerprint(), live.wire.reserved_bytes()
    stream = live.wire.open("Load")
    stream.send(live.load_opening(2), live.load_chunk())
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    new = attach(live, live.token if same_client else 0)
    stream.send(pb.LoadRequest(commit=True))
    refusal(stream.receive, *refused)
    assert (live.fingerprint(), live.wire.reserved_bytes()) == (before, reserved)
    live.load(live.load_opening(2, attach_token=new.token), live.load_chunk(commit=True))
    assert new.step(2).result.step == 2


# --- the load, the epoch and the durable step that a client knows -----------------------------------------------


@pytest.mark.parametrize("where", ["stream", "Step"])
@pytest.mark.parametrize("step", [1, 2], ids=["replay", "next"])
@pytest.mark.parametrize("load", [0, 2, 2**64 - 1])
def test_a_step_for_the_state_of_another_load_is_refused(
    live: Any, untouched: Any, load: int, step: int, where: str
) -> None:
    begin = step_pb2.StepBegin(step=step, load=load)
    calls = {
        "stream": lambda: live.attach(live.frame(begin=begin, commit=True)),
        "Step": lambda: live.wire.unary("Step", live.unary_step(step, begin=begin)),
    }
    refused = untouched(calls[where], "ABORTED", "STATE_CHANGED", f"state of load {load}", "last load is 1")
    assert refused.metadata == {"load": str(load), "applied_load": "1"}


@pytest.mark.parametrize("known", [{}, {"load": 1}], ids=["unset", "right"])
def test_a_step_for_the_state_of_the_last_load_is_applied(live: Any, known: dict[str, int]) -> None:
    begins = [step_pb2.StepBegin(step=step, **known) for step in (2, 3)]
    (answer,) = live.attach(live.frame(begin=begins[0], commit=True))
    assert (answer.result.step, answer.result.replayed) == (2, False)
    unary = pb.StepResponse.FromString(live.wire.unary("Step", live.unary_step(3, begin=begins[1])))
    assert (unary.result.step, unary.result.replayed) == (3, False)


@pytest.mark.parametrize("known", [{}, {"load": 1}], ids=["unset", "set"])
def test_a_load_that_is_committed_while_a_step_arrives_is_noticed_at_its_commit(
    live: Any, attach: Any, until: Any, refusal: Any, known: dict[str, int]
) -> None:
    """A gradient of other parameters is applied only for a client that does not mind."""
    client, reserved = attach(live, live.token), live.wire.reserved_bytes()
    client.stream.send(live.frame(0, 200, begin=step_pb2.StepBegin(step=2, **known)))
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    live.load(live.load_opening(2, attach_token=client.token), live.load_chunk(commit=True))
    before = live.fingerprint()
    client.stream.send(live.frame(200, commit=True))
    if known:
        refusal(client.stream.receive, "ABORTED", "STATE_CHANGED", "state of load 1", "last load is 2")
        assert live.fingerprint() == before
    else:
        assert client.receive().result.step == 2


@pytest.mark.parametrize("epoch", [2, 2**64 - 1])
def test_a_load_of_another_epoch_is_stale(live: Any, untouched: Any, epoch: int) -> None:
    refused = untouched(
        lambda: live.load(live.load_opening(2, epoch=epoch), live.load_chunk(commit=True)),
        "FAILED_PRECONDITION",
        "STALE_EPOCH",
        f"of epoch {epoch}",
    )
    assert refused.metadata == {"epoch": "1", "actual_epoch": str(epoch)}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_load_of_the_sessions_epoch_is_committed(live: Any, epoch: int) -> None:
    answer = live.load(live.load_opening(2, epoch=epoch), live.load_chunk(commit=True))
    assert (answer.session.applied_load, answer.replayed) == (2, False)


def test_a_stream_steps_in_the_epoch_that_it_was_opened_in(live: Any, server: Any, attach: Any, refusal: Any) -> None:
    """A begin without an epoch brings that of its stream; a call without one skips the check."""
    old = attach(live, live.token)
    assert old.step(2).result.step == 2
    server.registry.get(live.id).ledger.epoch = 2
    before = live.fingerprint()
    refused = refusal(lambda: old.step(3), "FAILED_PRECONDITION", "STALE_EPOCH", "in epoch 2", "of epoch 1")
    assert refused.metadata == {"epoch": "2", "actual_epoch": "1"}
    assert live.fingerprint() == before
    answer = live.wire.unary("Step", live.unary_step(3, attach_token=old.token))
    assert pb.StepResponse.FromString(answer).result.step == 3
    assert attach(live, old.token).step(4).result.epoch == 2


@pytest.mark.parametrize("known", [1, 2**64 - 1])
@pytest.mark.parametrize("token", ["own", "none"])
def test_a_server_that_has_lost_durable_steps_refuses_the_client(
    live: Any, untouched: Any, known: int, token: str
) -> None:
    """Nobody is displaced by it."""
    opening = live.opening(attach_token=live.token if token == "own" else 0, durable_step=known)
    refused = untouched(
        lambda: live.wire.stream("Attach", [opening]),
        "DATA_LOSS",
        "DURABLE_STEP_LOST",
        "durable up to step 0 here",
        f"the client knows step {known}",
    )
    assert refused.metadata == {"durable_step": "0", "known_durable_step": str(known)}
    live.wire.unary("Step", live.unary_step(1))


def test_a_server_that_has_every_durable_step_serves_the_client(live: Any, server: Any, attach: Any) -> None:
    server.registry.get(live.id).ledger.durable_step = 1
    for known in (0, 1):
        client = attach(live, live.token, durable_step=known)
        assert client.opened.durable_step == 1
    assert client.step(2).result.durable_step == 1


@pytest.mark.parametrize("where", ["stream", "Step"])
def test_a_trace_context_of_another_form_is_refused(live: Any, untouched: Any, where: str) -> None:
    begin = step_pb2.StepBegin(step=2, traceparent="00-1-2-01")
    calls = {
        "stream": lambda: live.attach(live.frame(begin=begin, commit=True)),
        "Step": lambda: live.wire.unary("Step", live.unary_step(2, begin=begin)),
    }
    untouched(calls[where], "INVALID_ARGUMENT", "INVALID_CONFIG", "'00-1-2-01'", field="begin.traceparent")


# --- the lease ---------------------------------------------------------------------------------------------------


def test_a_lease_does_not_run_while_a_load_is_on_its_way(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any
) -> None:
    with serve(step_idle_seconds=1e9) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,), lease={"seconds": 10})))
        reserved = wire.reserved_bytes()
        stream = wire.open("Load")
        stream.send(live.load_opening(1))
        until(lambda: wire.reserved_bytes() == reserved + 40)
        clock.now += 1000.0
        assert server.registry.sweep() == []
        stream.send(live.load_chunk(values=np.ones(10, np.float32), commit=True))
        assert pb.LoadResponse.FromString(stream.receive()).session.applied_load == 1
        stream.finish()
        clock.now += 10.0
        assert wire.get(live.id).applied_load == 1
        clock.now += 0.5
        until(lambda: wire.info().sessions == 0)
