"""Checkpoints, rollbacks and forks through the client: what was is there again, to the last bit."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire.aio
from stepwire.connection.channel import Calls
from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from tests.integration.durability.test_recovery import KINDS, Kind, created, gradient, server, steps
from tests.integration.probes import half_applied
from tests.integration.training import bits, same_bits
from tests.support.raw import RawClient, Refused

pytestmark = pytest.mark.many

ADAM = KINDS["adam"]
LEVELS = ("journal", "checkpoint")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def durable(folder: pathlib.Path) -> Iterator[Server]:
    with server(folder) as running:
        yield running


@pytest.fixture
def client(durable: Server) -> Iterator[stepwire.Client]:
    with stepwire.connect(durable.target, transport="tcp", timeout=120.0) as client:
        yield client


def same_arrays(one: stepwire.Snapshot, other: stepwire.Snapshot) -> bool:
    """Tell whether two states differ in the number of their step at most."""
    return {slot: bits(arrays) for slot, arrays in one.slots.items()} == {
        slot: bits(arrays) for slot, arrays in other.slots.items()
    } and (one.tensor_steps, one.tensor_scalars, one.loss_scale) == (
        other.tensor_steps,
        other.tensor_scalars,
        other.loss_scale,
    )


ROLLED = ["adam", "int8 moments", "accumulation", "loss scaling", "nadam", "average", "overlap", "int8 gradients"]


@pytest.mark.parametrize("step", [None, 3], ids=["a checkpoint", "a step of the log"])
@pytest.mark.parametrize("name", ROLLED)
def test_a_rollback_goes_on_as_the_earlier_state_would_have(
    name: str, step: int | None, client: stepwire.Client, folder: pathlib.Path
) -> None:
    """Also after a crash, and after a crash behind further steps."""
    kind = KINDS[name]
    session = created(client, kind, durability="journal")
    steps(session, kind, 1, 2)
    session.save_checkpoint("best")
    if step is not None:
        steps(session, kind, 3, step - 2)
    state = session.state()
    ahead = steps(session.fork(), kind, 20, 3)
    steps(session, kind, 4, 3)
    every = kind.creation.get("accumulation_steps", 1)
    after = session.applied_step + (state.step - session.applied_step) % every
    parameters: Any = session.rollback(step) if step is not None else session.rollback(checkpoint="best")
    assert bits(parameters) == bits(state.slots["param"])
    assert (session.applied_step, same_arrays(session.state(), state)) == (after, True)
    assert session.loss_scale == (None if state.loss_scale is None else state.loss_scale[0])
    shutil.copytree(folder, one := folder.with_name("one"))
    assert steps(session, kind, 20, 3) == ahead
    final = session.state()
    shutil.copytree(folder, other := folder.with_name("other"))
    session.close()
    with server(one) as second, stepwire.connect(second.target, transport=kind.transport) as again:
        there = again.session(session.own_id)
        assert same_arrays(there.state(), state)
        assert (there.info().applied_step, steps(there, kind, 20, 3)) == (after, ahead)
    with server(other) as second, stepwire.connect(second.target, transport=kind.transport) as again:
        assert same_bits(again.session(session.own_id).state(), final)


def test_checkpoints_have_names(client: stepwire.Client) -> None:
    session = created(client, ADAM, durability="journal")
    first = session.save_checkpoint("first")
    assert (first.name, first.step, first.load, first.damage) == ("first", 0, 1, "")
    assert session.save_checkpoint("first") == first
    steps(session, ADAM, 1, 1)
    second = session.save_checkpoint("second")
    assert session.checkpoints() == (first, second)
    assert session.verify_checkpoint("second") == second
    session.delete_checkpoint("first")
    assert session.checkpoints() == (second,)
    with pytest.raises(stepwire.InvalidRequestError, match="exists"):
        session.save_checkpoint("second") if steps(session, ADAM, 2, 1) else None
    with pytest.raises(stepwire.InvalidRequestError, match="there are second"):
        session.verify_checkpoint("first")


def test_a_session_in_memory_has_none(client: stepwire.Client) -> None:
    session = created(client, ADAM)
    for call in (
        lambda: session.save_checkpoint("a"),
        session.checkpoints,
        lambda: session.rollback(1),
        session.fork,
    ):
        with pytest.raises(stepwire.UnsupportedFeatureError, match="in memory alone"):
            call()
    assert steps(session, ADAM, 1, 1)


def test_wrong_arguments_are_named(client: stepwire.Client) -> None:
    session = created(client, ADAM, durability="journal")
    steps(session, ADAM, 1, 2)
    for arguments in ({}, {"step": 1, "checkpoint": "a"}, {"step": -1}, {"step": 7}, {"checkpoint": "a"}):
        with pytest.raises(stepwire.InvalidRequestError):
            session.rollback(**arguments)
    with pytest.raises(stepwire.InvalidRequestError, match="the steps 1 to 2"):
        session.rollback(3)
    before = session.state()
    with pytest.raises(stepwire.InvalidRequestError, match="label"):
        session.fork(label="\x1b")
    assert same_bits(session.state(), before)
    assert steps(session, ADAM, 3, 1)


def test_a_rollback_settles_a_step_in_doubt(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after it is a new one, whatever became of the old."""
    session = created(client, ADAM, durability="journal")
    steps(session, ADAM, 1, 1)
    state = session.state()
    with pytest.raises(stepwire.DeadlineExceededError):
        session.step(gradient(2, ADAM), timeout=1e-9)
    assert session.statistics().step_in_doubt == 2
    session.rollback(1)
    assert session.statistics().step_in_doubt is None
    assert same_arrays(session.state(), state)
    assert session.applied_step in (1, 2)


def test_a_rollback_whose_reply_is_lost_is_made_once(
    durable: Server, client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = created(client, ADAM, durability="journal")
    steps(session, ADAM, 1, 1)
    state, lost, upload = session.state(), list[str](), Calls.upload
    steps(session, ADAM, 2, 1)

    def losing(calls: Calls, method: str, *arguments: Any) -> Any:
        response = upload(calls, method, *arguments)
        if not lost:
            lost.append(method)
            raise stepwire.UnavailableError("the reply was lost", reason=stepwire.Reason.UNREACHABLE)
        return response

    monkeypatch.setattr(Calls, "upload", losing)
    session.rollback(1)
    ledger = durable.registry.get(session.session_id).ledger
    assert (lost, ledger.applied_load, ledger.applied_step) == (["Rollback"], 2, 2)
    assert same_arrays(session.state(), state)
    assert steps(session, ADAM, 3, 1)


def test_error_feedback_is_forgotten(client: stepwire.Client) -> None:
    options = {"gradient_dtype": "int8", "durability": "journal"}
    session = created(client, ADAM, error_feedback=True, **options)
    first = steps(session, ADAM, 1, 1)
    steps(session, ADAM, 2, 2)
    session.load_state(session.state())
    session.save_checkpoint("here")
    expected = steps(session, ADAM, 1, 2)
    session.rollback(checkpoint="here")
    assert steps(session, ADAM, 1, 2) == expected
    assert first


def test_loss_scales_come_back(client: stepwire.Client) -> None:
    session = created(
        client, ADAM, durability="journal", loss_scaling=LossScaling(initial_scale=4.0, growth_interval=2)
    )
    session.save_checkpoint("start")
    steps(session, ADAM, 1, 4)
    assert session.loss_scale == 16.0
    session.rollback(checkpoint="start")
    assert session.loss_scale == 4.0


@pytest.mark.parametrize("level", LEVELS)
def test_forks_go_their_own_ways(level: Any, client: stepwire.Client, folder: pathlib.Path) -> None:
    session = created(client, ADAM, durability=level)
    steps(session, ADAM, 1, 2)
    session.save_checkpoint("best")
    state = session.state()
    ahead = steps(session, ADAM, 3, 2)
    final = session.state()
    fork = session.fork(checkpoint="best", label="branch", keep=True)
    assert (fork.applied_step, same_bits(fork.state(), state)) == (2, True)
    assert (fork.info().label, fork.own_id == session.own_id) == ("branch", False)
    other = fork.step(gradient(9, ADAM))
    assert same_bits(session.state(), final)
    fork.save_checkpoint("own")
    moved = fork.state()
    session.save_checkpoint("last")
    shutil.copytree(folder, image := folder.with_name("image"))
    session.close()
    assert same_bits(fork.state(), moved)
    third = fork.fork(checkpoint="auto-0000000002-000001", durability="memory")
    assert steps(third, ADAM, 3, 2) == ahead
    fork.close()
    assert same_bits(third.state(), final)
    with server(image) as second, stepwire.connect(second.target, transport="tcp") as again:
        assert same_bits(again.session(session.own_id).state(), final)
        there = again.session(fork.own_id)
        assert same_bits(there.state(), moved)
        assert bits(other) == bits(moved.slots["param"])  # type: ignore[arg-type]


def test_a_fork_is_asked_for_again_by_its_request(client: stepwire.Client) -> None:
    session = created(client, ADAM, durability="journal")
    steps(session, ADAM, 1, 1)
    one = session.fork(request_id="branch")
    steps(one, ADAM, 2, 1)
    again = session.fork(request_id="branch")
    assert (again.own_id, again.applied_step) == (one.own_id, 2)
    with pytest.raises(stepwire.InvalidRequestError, match="another config"):
        session.fork(request_id="branch", label="other")


@pytest.mark.parametrize("loss", ["checkpoint", "session"])
def test_a_fork_is_repeated_though_its_state_is_gone(loss: str, client: stepwire.Client, durable: Server) -> None:
    session = created(client, ADAM, durability="journal")
    session.save_checkpoint("best")
    steps(session, ADAM, 1, 1)
    request = pb.ForkSessionRequest(session_id=session.own_id, request_id="branch", checkpoint="best")
    with RawClient(durable.target) as raw:
        first = raw.call("ForkSession", request)
        if loss == "checkpoint":
            session.delete_checkpoint("best")
        else:
            session.close()
        again = raw.call("ForkSession", request)
        assert (again.replayed, again.session.session_id) == (True, first.session.session_id)
        assert again.attach_token == first.attach_token
        request.label = "other"
        with pytest.raises(Refused, match="another config") as refused:
            raw.call("ForkSession", request)
        assert refused.value.reason == "INVALID_CONFIG"
        request.request_id = "new"
        with pytest.raises(Refused) as refused:
            raw.call("ForkSession", request)
        assert refused.value.reason == ("INVALID_CONFIG" if loss == "checkpoint" else "SESSION_NOT_FOUND")


def test_a_fork_is_repeated_by_a_session_with_a_half_applied_step(client: stepwire.Client, durable: Server) -> None:
    """A fork of the present state is repeated without a look at that state."""
    session = created(client, Kind({"non_finite": "allow"}), durability="journal")
    request = pb.ForkSessionRequest(session_id=session.own_id, request_id="branch")
    with RawClient(durable.target) as raw:
        first = raw.call("ForkSession", request)
        saved = session.save_checkpoint("here")
        half_applied(durable.registry, raw, session.own_id)
        assert raw.call("ForkSession", request).session.session_id == first.session.session_id
        save = pb.SaveCheckpointRequest(session_id=session.own_id, name="here")
        again = raw.call("SaveCheckpoint", save)
        assert (again.replayed, again.checkpoint.step) == (True, saved.step)
        save.name = "there"
        with pytest.raises(Refused, match="half applied"):
            raw.call("SaveCheckpoint", save)


def test_a_rollback_is_repeated_though_its_state_is_gone(client: stepwire.Client, durable: Server) -> None:
    session = created(client, ADAM, durability="journal")
    session.save_checkpoint("best")
    steps(session, ADAM, 1, 1)
    with RawClient(durable.target) as raw:
        stream = raw.attach(session.own_id)
        stream.receive()
        request = pb.RollbackRequest(
            session_id=session.own_id, attach_token=stream.token, load=2, applied_step=1, checkpoint="best"
        )
        assert not raw.call("Rollback", request).replayed
        raw.call("DeleteCheckpoint", pb.DeleteCheckpointRequest(session_id=session.own_id, name="best"))
        assert raw.call("Rollback", request).replayed


def test_a_fork_nobody_keeps_ends_with_its_client(durable: Server) -> None:
    with stepwire.connect(durable.target) as client:
        session = created(client, ADAM, durability="journal")
        fork = session.fork()
        assert durable.registry.statistics().sessions == 2
    assert [each.session_id for each in durable.registry.page("", 9)[0]] == [session.own_id]
    assert fork.own_id != session.own_id


def test_shards_are_saved_rolled_back_and_forked_as_one(tmp_path: pathlib.Path) -> None:
    with (
        server(tmp_path / "0") as one,
        server(tmp_path / "1") as two,
        stepwire.connect([one.target, two.target], transport="tcp") as client,
    ):
        session = created(client, ADAM, durability="journal", clip_grad_norm=1.0)
        steps(session, ADAM, 1, 2)
        saved = session.save_checkpoint("best")
        state = session.state()
        ahead = steps(session, ADAM, 3, 2)
        assert (saved.step, saved.damage, session.checkpoints()) == (2, "", (saved,))
        assert session.verify_checkpoint("best") == saved
        fork = session.fork(checkpoint="best")
        assert steps(fork, ADAM, 3, 2) == ahead
        with stepwire.connect([two.target, one.target], transport="tcp") as other:  # the same servers otherwise
            assert other.session(session.session_id).fork(checkpoint="best").applied_step == 2
        assert bits(session.rollback(checkpoint="best")) == bits(state.slots["param"])  # type: ignore[arg-type]
        assert steps(session, ADAM, 3, 2) == ahead
        ahead_of_rollback = session.state()
        with pytest.raises(stepwire.InvalidRequestError, match=r"use rollback\(checkpoint=") as unreachable:
            session.rollback(2)
        assert unreachable.value.metadata["field"] == "step"
        assert same_bits(session.state(), ahead_of_rollback)
        session.rollback(checkpoint="best")
        assert same_arrays(session.state(), state)
        assert (session.applied_step, session.fork().applied_step) == (6, 6)
        session.shards[1].delete_checkpoint("best")
        (damaged,) = [info for info in session.checkpoints() if info.name == "best"]
        assert damaged.damage == "shard 1 has none of this name"
        before = session.state()
        with pytest.raises(stepwire.InvalidRequestError, match="shard 1 has none of this name"):
            session.rollback(checkpoint="best")
        with pytest.raises(stepwire.InvalidRequestError, match="shard 1") as refused:
            session.verify_checkpoint("best")
        assert refused.value.metadata["shard"].startswith("shard 1")
        assert same_bits(session.state(), before)
        with pytest.raises(stepwire.UnsupportedFeatureError, match="fork the whole"):
            session.shards[0].fork()


def test_the_asynchronous_client_has_them_too(durable: Server) -> None:
    async def body() -> None:
        async with stepwire.aio.connect(durable.target) as client:
            parameters = {"w": np.zeros(4, np.float32)}
            async with await client.create_session(parameters, durability="journal") as session:
                before: Any = await session.step({"w": np.ones(4, np.float32)})
                saved = await session.save_checkpoint("best")
                assert await session.checkpoints() == (saved,)
                async with await session.fork(checkpoint="best") as fork:
                    assert isinstance(fork, stepwire.aio.AsyncSession)
                    assert fork.applied_step == 1
                    await fork.step({"w": np.ones(4, np.float32)})
                await session.step({"w": np.ones(4, np.float32)})
                after: Any = await session.rollback(checkpoint="best")
                assert after["w"].tobytes() == before["w"].tobytes()

    asyncio.run(body())
