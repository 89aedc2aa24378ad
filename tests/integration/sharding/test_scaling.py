"""A model that moves to another number of servers: the bits of one that stays, whatever it keeps."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.sharding.pair import SHAPES, Opened, Pair, arrays, over
from tests.integration.training import bits, same_bits
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

MODELS: dict[str, dict[str, Any]] = {
    "clipped": {"optimizer": stepwire.Adam(lr=1e-2, amsgrad=True), "clip_grad_norm": 1.0},
    "by group": {
        "optimizer": stepwire.AdamW(lr=1e-2),
        "groups": [{"params": ["w", "head"], "clip_grad_norm": 0.5, "lr": 1e-3}],
        "schedule": stepwire.Schedule.exponential(0.9, warmup_steps=2),
        "frozen": ["b"],
    },
    "accumulated": {"optimizer": stepwire.NAdam(), "accumulation_steps": 4},
    "in 8 bits": {"optimizer": stepwire.Adam(lr=1e-2), "state_precision": "int8"},
    "in bfloat16": {"optimizer": stepwire.Adam(lr=1e-2), "state_precision": "bfloat16", "non_finite": "allow"},
    "averaged": {"optimizer": stepwire.Adam(lr=1e-2), "parameter_average_decay": 0.9},
    "scaled": {"optimizer": stepwire.Adam(lr=1e-2), "loss_scaling": stepwire.LossScaling(initial_scale=4.0)},
    "layerwise": {"optimizer": stepwire.LAMB(lr=1e-2)},
    "momentum": {"optimizer": stepwire.SGD(lr=1e-2, momentum=0.9), "missing_gradient": "keep"},
}
NUMBERS = [(2, 4), (4, 2), (3, 2), (1, 3), (3, 1)]


def moved(session: stepwire.Session, servers: list[Server], count: int, first: int = 0) -> str:
    """Move a session onto some of the servers; all of them are asked for it."""
    onto = [server.target for server in servers[first : first + count]]
    return stepwire.move_session(session.session_id, [server.target for server in servers], onto)


@pytest.mark.many
@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_moves_has_the_bits_of_one_that_stays(
    servers: list[Server], opened: Opened, one: stepwire.Client, model: str
) -> None:
    options = MODELS[model]
    pair = Pair(one, over(servers, opened, 2), SHAPES, **options)
    for step in range(1, 10):
        if step in (3, 6, 8):
            before, count = pair.cut.session_id, {3: 4, 6: 3, 8: 2}[step]
            found = moved(pair.cut, servers, count, first=step % 2)
            assert len(pair.cut.shards) == before.count(",") + 1  # it has not been there since
        gradient = arrays(SHAPES, step)
        if options.get("missing_gradient") and step % 2:
            del gradient["w"]
        pair.step(gradient)
        if step in (3, 6, 8):
            assert pair.cut.session_id == found
            assert len(pair.cut.shards) == (min(count, 3) if model == "layerwise" else count)  # in whole tensors
    pair.compare()
    pair.close()


@pytest.mark.many
@pytest.mark.parametrize(("former", "new"), NUMBERS)
def test_any_number_of_shards_becomes_any_other(
    servers: list[Server], opened: Opened, one: stepwire.Client, former: int, new: int
) -> None:
    with contextlib.closing(Pair(one, over(servers, opened, max(former, 2)), SHAPES, clip_grad_norm=1.0)) as pair:
        if former == 1:
            moved(pair.cut, servers, 1)
        pair.step(arrays(SHAPES, 1))
        assert len(pair.cut.shards) == former
        found = moved(pair.cut, servers, new)
        pair.compare()  # a pull follows too
        assert pair.cut.session_id == found
        pair.step(arrays(SHAPES, 2))
        pair.compare()


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_whose_reply_was_lost_before_a_move_counts_once(
    servers: list[Server], opened: Opened, one: stepwire.Client, applied: bool
) -> None:
    with contextlib.closing(Pair(one, over(servers, opened, 3), SHAPES, clip_grad_norm=1.0)) as pair:
        pair.step(arrays(SHAPES, 1))
        with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
            pair.cut.step(arrays(SHAPES, 2))
        moved(pair.cut, servers, 2, first=2)
        pair.whole.step(arrays(SHAPES, 2))
        assert bits(pair.cut.step(arrays(SHAPES, 2))) == bits(pair.whole.pull())  # the same gradient: the same step
        result, expected = pair.cut.last_result, pair.whole.last_result
        assert result is not None and expected is not None
        assert (result.step, result.replayed, result.grad_norm) == (2, applied, expected.grad_norm)
        assert [group.grad_norm for group in result.groups] == [group.grad_norm for group in expected.groups]
        pair.step(arrays(SHAPES, 3))
        pair.compare()


@pytest.mark.parametrize("applied", [True, False])
def test_another_gradient_after_a_lost_reply_is_another_step(
    servers: list[Server], opened: Opened, one: stepwire.Client, applied: bool
) -> None:
    with contextlib.closing(Pair(one, over(servers, opened, 2), SHAPES, clip_grad_norm=1.0)) as pair:
        with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
            pair.cut.step(arrays(SHAPES, 1))
        moved(pair.cut, servers, 3)
        if applied:
            pair.whole.step(arrays(SHAPES, 1))
        pair.step(arrays(SHAPES, 2))
        pair.compare()


def test_a_step_that_one_shard_alone_has_keeps_the_session_where_it_is(
    servers: list[Server], opened: Opened, one: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwire.sharding.move._REST_SECONDS", 0.0)
    options = {"optimizer": stepwire.Adam(lr=1e-2), "non_finite": "allow"}
    with contextlib.closing(Pair(one, over(servers, opened, 2), SHAPES, **options)) as pair:
        second = pair.cut._link.shards[1].hold
        with (
            lost_replies(applied=False, of=lambda hold: hold is second),
            pytest.raises(stepwire.DeadlineExceededError),
        ):
            pair.cut.step(arrays(SHAPES, 1))
        with pytest.raises(stepwire.StepMismatchError, match=r"at the steps \[1, 0\]"):
            moved(pair.cut, servers, 3)
        pair.step(arrays(SHAPES, 1))  # nobody has to wait for the freeze to end
        moved(pair.cut, servers, 3)
        pair.step(arrays(SHAPES, 2))
        pair.compare()


def test_a_client_that_was_fenced_stays_fenced_behind_a_move(servers: list[Server], opened: Opened) -> None:
    client = over(servers, opened, 2)
    with client.create_session(arrays(SHAPES, 0), non_finite="allow") as first:
        first.step(arrays(SHAPES, 1))
        other = client.session(first.session_id)
        other.attach(take_over=True)
        moved(first, servers, 3)
        other.step(arrays(SHAPES, 2))
        with pytest.raises(stepwire.FencedError):
            first.step(arrays(SHAPES, 2))
        first.attach(take_over=True)
        first.step(arrays(SHAPES, 3))
        assert first.applied_step == 3


def test_the_former_id_finds_the_session_where_it_is(servers: list[Server], opened: Opened) -> None:
    client = over(servers, opened, 5)
    with client.create_session(arrays(SHAPES, 0)) as session:
        session.step(arrays(SHAPES, 1))
        former = session.session_id
        second = moved(session, servers, 2, first=1)
        third = stepwire.move_session(second, [s.target for s in servers], [servers[4].target])
        again = client.session(former)
        assert (again.session_id, len(again.shards), again.applied_step) == (third, 1, 1)
        assert same_bits(again.state(), session.state())
        assert session.session_id == third


def test_a_move_by_a_former_id_moves_the_session_from_where_it_is(servers: list[Server], opened: Opened) -> None:
    client, known = over(servers, opened, 2), [server.target for server in servers[:2]]
    with client.create_session(arrays(SHAPES, 0)) as session:
        session.step(arrays(SHAPES, 1))
        former = session.session_id
        second = moved(session, servers, 2, first=2)
        assert stepwire.move_session(former, known, [servers[2].target, servers[3].target]) == second  # it is there
        third = stepwire.move_session(former, known, [servers[4].target, servers[0].target])
        assert stepwire.move_session(former, known, [servers[4].target, servers[0].target]) == third
        back = stepwire.move_session(former, known, [servers[2].target, servers[3].target])
        assert len({former, second, third, back}) == 4
        assert session.step(arrays(SHAPES, 2)) is not None
        assert (session.session_id, session.applied_step) == (back, 2)
        held = [{each.session_id for each in opened((server.target,)).sessions()} for server in servers]
        first, last = back.split(",")
        assert first in held[2] and last in held[3]


def test_a_model_too_small_for_all_servers_stays_on_those_that_it_needs(servers: list[Server], opened: Opened) -> None:
    client, known = over(servers, opened, 1), servers[0].target
    onto = [server.target for server in servers[1:4]]
    with client.create_session({"w": np.zeros(1, np.float32)}) as session:
        former = session.session_id
        found = stepwire.move_session(former, known, onto)
        assert "," not in found
        assert stepwire.move_session(former, known, onto) == found
        assert stepwire.move_session(former, known, onto[1:]) != found


def test_a_request_that_comes_again_finds_its_session_where_it_is(servers: list[Server], opened: Opened) -> None:
    client, name = over(servers, opened, 4), "test-of-moves"
    with client.create_session(arrays(SHAPES, 0), request_id=name) as session:
        session.step(arrays(SHAPES, 1))
        held = sum(1 for _ in client.sessions())
        found = moved(session, servers, 2)
        again = client.create_session(arrays(SHAPES, 0), request_id=name)
        assert (again.session_id, again.applied_step) == (found, 1)
        assert sum(1 for _ in client.sessions()) == held - 2


def test_error_feedback_comes_along(servers: list[Server], opened: Opened) -> None:
    options: dict[str, Any] = {"gradient_dtype": "int8", "error_feedback": True, "non_finite": "allow"}
    shapes = {"w": (4, 65_536)}  # blocks of codes that no cut parts
    client, stays = over(servers, opened, 2), over(servers, opened, 2)
    with (
        client.create_session(arrays(shapes, 0), **options) as session,
        stays.create_session(arrays(shapes, 0), **options) as other,
    ):
        for step in range(1, 5):
            if step == 3:
                moved(session, servers, 4)
            expected = bits(other.step(arrays(shapes, step)))
            assert bits(session.step(arrays(shapes, step))) == expected
        assert len(session.shards) == 4


def test_a_session_with_rows_by_ids_is_refused_by_name(servers: list[Server], opened: Opened) -> None:
    client = over(servers, opened, 2)
    with client.create_session({"t": stepwire.Table((4096, 64), "torch_sparse", hashed=True)}) as session:
        with pytest.raises(stepwire.UnsupportedFeatureError, match="rows that are named by ids") as refused:
            moved(session, servers, 3)
        assert refused.value.metadata["feature"] == "row_ids"


@pytest.mark.many
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_client_follows_while_one_of_the_former_servers_is_there(gone: int, transport: str) -> None:
    """The shard that is there tells of the move, and ends the calls of the other one, which would wait in vain."""
    options: dict[str, Any] = {"optimizer": stepwire.Adam(lr=1e-2), "non_finite": "allow"}
    with contextlib.ExitStack() as stack:
        former = [stack.enter_context(numpy_server()) for _ in range(2)]
        new = stack.enter_context(numpy_server())
        targets = [server.target for server in former]
        client = stack.enter_context(stepwire.connect(targets, transport=transport, timeout=3600.0))
        session = client.create_session(arrays(SHAPES, 0), keep=True, **options)
        other = stack.enter_context(stepwire.connect(new.target)).create_session(arrays(SHAPES, 0), **options)
        for step in (1, 2, 3):
            if step == 3:
                found = stepwire.move_session(session.session_id, targets, [new.target])
                former[gone].close()
            assert bits(session.step(arrays(SHAPES, step))) == bits(other.step(arrays(SHAPES, step)))
        assert session.session_id == found
