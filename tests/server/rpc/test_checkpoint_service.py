"""Checkpoints, rollbacks and forks, as another language would ask for them."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2
from stepwire_server.server import Server
from tests.server.conftest import SLOTS, Live, Refused, Wire, adam_config
from tests.support.numpy_server import numpy_server

JOURNAL, CHECKPOINT = session_pb2.DURABILITY_JOURNAL, session_pb2.DURABILITY_CHECKPOINT


class Durable(Live):
    """A durable session, and the calls about its checkpoints."""

    def __init__(self, wire: Wire, level: Any = JOURNAL, **fields: Any) -> None:
        super().__init__(wire, wire.create(adam_config((70, 30), (5,), durability=level, **fields)))
        self.load(self.load_opening(1), self.load_chunk(commit=True))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return a call of the service for this session."""
        request, response = getattr(pb, f"{method}Request"), getattr(pb, f"{method}Response")
        return lambda **fields: response.FromString(self.wire.unary(method, request(session_id=self.id, **fields)))

    def steps(self, first: int, last: int) -> list[Any]:
        """Take steps; return the state after each."""
        states = []
        for step in range(first, last + 1):
            self.step(step, self.gradient(step))
            states.append(self.state())
        return states

    def state(self, session_id: str = "") -> Any:
        """Return t of each tensor, and all slots."""
        header, slots = self.wire.pull(session_id or self.id, *SLOTS)
        return list(header.tensor_steps), slots

    def names(self, session_id: str = "") -> list[str]:
        request = pb.ListCheckpointsRequest(session_id=session_id or self.id)
        found = pb.ListCheckpointsResponse.FromString(self.wire.unary("ListCheckpoints", request)).checkpoints
        return [checkpoint.name for checkpoint in found]

    def rollback(self, load: int, **fields: Any) -> Any:
        return self.Rollback(attach_token=self.token, load=load, **fields)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def durable(folder: pathlib.Path) -> Iterator[Server]:
    with numpy_server(data_dir=str(folder), max_chunk_bytes=64 << 10) as server:
        yield server


@pytest.fixture
def wire(durable: Server) -> Iterator[Wire]:
    with Wire(durable.target) as wire:
        yield wire


def test_a_checkpoint_is_saved_listed_verified_and_deleted(wire: Wire) -> None:
    live = Durable(wire)
    live.steps(1, 3)
    saved = live.SaveCheckpoint(name="best")
    assert (saved.checkpoint.name, saved.checkpoint.step, saved.checkpoint.load, saved.replayed) == (
        "best",
        3,
        1,
        False,
    )
    assert live.SaveCheckpoint(name="best") == pb.SaveCheckpointResponse(checkpoint=saved.checkpoint, replayed=True)
    assert list(live.ListCheckpoints().checkpoints) == [saved.checkpoint]
    assert live.VerifyCheckpoint(name="best").checkpoint == saved.checkpoint
    live.steps(4, 4)
    live.SaveCheckpoint(name="later")
    assert live.names() == ["best", "later"]
    live.DeleteCheckpoint(name="best")
    assert live.names() == ["later"]
    assert wire.get(live.id).durable_step == 4


def test_a_name_is_never_given_twice(wire: Wire, refusal: Any) -> None:
    live = Durable(wire)
    live.SaveCheckpoint(name="best")
    live.steps(1, 1)
    refused = ("INVALID_ARGUMENT", "INVALID_CONFIG")
    refusal(lambda: live.SaveCheckpoint(name="best"), *refused, "exists", field="name")
    for name in ("", ".a", "a/b", "x" * 65, "auto-1"):
        refusal(lambda name=name: live.SaveCheckpoint(name=name), *refused, field="name")
    for method in ("VerifyCheckpoint", "DeleteCheckpoint"):
        refusal(lambda method=method: getattr(live, method)(name="none"), *refused, "there are best", field="name")
    assert live.names() == ["best"]


def test_the_newest_state_stays_when_its_checkpoint_is_deleted(
    wire: Wire, folder: pathlib.Path, durable: Server, refusal: Any
) -> None:
    live = Durable(wire, CHECKPOINT)
    (state,) = live.steps(1, 1)
    live.SaveCheckpoint(name="best")
    live.DeleteCheckpoint(name="best")
    assert live.names() == ["auto-0000000000-000001", "auto-0000000001-000001"]
    assert wire.get(live.id).durable_step == 1
    refusal(
        lambda: live.DeleteCheckpoint(name="auto-0000000001-000001"),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        "newest",
        field="name",
    )
    assert durable.registry.checkpoint_all()
    shutil.copytree(folder, image := folder.with_name("image"))
    with numpy_server(data_dir=str(image)) as second, Wire(second.target) as other:
        again = Durable.__new__(Durable)
        again.wire = other
        assert again.state(live.id) == state


def test_a_session_in_memory_has_no_checkpoints(wire: Wire, refusal: Any) -> None:
    live = Durable(wire, session_pb2.DURABILITY_MEMORY)
    calls: list[Callable[[], Any]] = [
        lambda: live.SaveCheckpoint(name="a"),
        lambda: live.ListCheckpoints(),
        lambda: live.VerifyCheckpoint(name="a"),
        lambda: live.DeleteCheckpoint(name="a"),
        lambda: live.rollback(2, checkpoint="a"),
        lambda: live.ForkSession(request_id="r"),
    ]
    for call in calls:
        refused = refusal(call, "FAILED_PRECONDITION", "UNSUPPORTED_FEATURE", "in memory alone")
        assert refused.metadata["feature"] == "durability_checkpoint"


def test_damage_is_listed_and_named(wire: Wire, folder: pathlib.Path, refusal: Any) -> None:
    live = Durable(wire)
    live.SaveCheckpoint(name="good")
    live.steps(1, 1)
    live.SaveCheckpoint(name="torn")
    path = folder / "sessions" / live.id / "checkpoints" / "torn"
    body = bytearray((path / "state.safetensors").read_bytes())
    body[-1] ^= 1
    (path / "state.safetensors").write_bytes(body)
    refused = refusal(lambda: live.VerifyCheckpoint(name="torn"), "DATA_LOSS", "CHECKPOINT_DAMAGED", "exp_avg_sq")
    assert refused.metadata["file"] == "torn/state.safetensors"
    before = live.state()
    refusal(lambda: live.rollback(2, checkpoint="torn"), "DATA_LOSS", "CHECKPOINT_DAMAGED")
    assert live.state() == before
    (path / "manifest.json").write_bytes(b"{}")
    good, torn = live.ListCheckpoints().checkpoints
    assert (good.damage, torn.name, torn.step, "crc32c" in torn.damage or "format" in torn.damage) == (
        "",
        "torn",
        0,
        True,
    )


def test_a_parked_session_stays_parked_while_its_checkpoints_are_listed(wire: Wire, durable: Server) -> None:
    live = Durable(wire)
    live.SaveCheckpoint(name="best")
    session = durable.registry.get(live.id)
    assert durable.registry.park(session)
    assert live.names() == ["auto-0000000000-000001", "best"]
    assert live.VerifyCheckpoint(name="best").checkpoint.load == 1
    assert durable.registry.statistics().sessions == 0


@pytest.mark.parametrize("level", [JOURNAL, CHECKPOINT], ids=["journal", "checkpoint"])
def test_a_rollback_is_a_load_and_survives_a_crash(wire: Wire, folder: pathlib.Path, level: Any) -> None:
    live = Durable(wire, level)
    states = live.steps(1, 2)
    live.SaveCheckpoint(name="best")
    live.steps(3, 5)
    done = live.rollback(2, checkpoint="best")
    assert (done.session.applied_step, done.session.applied_load, done.replayed) == (5, 2, False)
    assert live.state() == states[1]
    assert live.rollback(2, checkpoint="gone").replayed
    shutil.copytree(folder, image := folder.with_name("image"))
    live.steps(6, 7)
    expected = live.state()
    with numpy_server(data_dir=str(image)) as second, Wire(second.target) as other:
        live.wire = other
        assert (other.get(live.id).applied_step, other.get(live.id).applied_load) == (5, 2)
        assert live.state() == states[1]
        live.steps(6, 7)
        assert live.state() == expected


def test_a_step_between_checkpoints_is_made_again(wire: Wire, folder: pathlib.Path, refusal: Any) -> None:
    live = Durable(wire)
    states = live.steps(1, 3)
    live.SaveCheckpoint(name="best")
    states += live.steps(4, 6)
    for load, step in enumerate((5, 2, 4, 3, 1), start=2):
        live.rollback(load, step=step)
        assert live.state() == states[step - 1]
    refusal(
        lambda: live.rollback(7, step=9),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        "reachable are the checkpoints 'best' (step 3), and the steps 1 to 6",
        field="step",
    )
    shutil.copytree(folder, image := folder.with_name("image"))
    with numpy_server(data_dir=str(image)) as second, Wire(second.target) as other:
        live.wire = other
        assert live.state() == states[0]
        assert other.get(live.id).applied_load == 6


def test_a_checkpointed_session_goes_back_to_checkpoints_alone(wire: Wire, refusal: Any) -> None:
    live = Durable(wire, CHECKPOINT)
    states = live.steps(1, 1)
    live.SaveCheckpoint(name="best")
    live.steps(2, 3)
    refusal(
        lambda: live.rollback(2, step=2),
        "INVALID_ARGUMENT",
        "INVALID_CONFIG",
        "reachable are the checkpoints 'best' (step 1)",
        field="step",
    )
    refusal(lambda: live.rollback(2), "INVALID_ARGUMENT", "INVALID_CONFIG", field="checkpoint")
    refusal(lambda: live.rollback(3, step=1), "ABORTED", "STEP_MISMATCH")
    refusal(lambda: live.rollback(2, step=1, applied_step=2), "ABORTED", "STEP_SUPERSEDED")
    live.rollback(2, step=1, applied_step=9)
    assert live.state() == states[0]
    assert wire.get(live.id).applied_step == 9


@pytest.mark.parametrize("level", [JOURNAL, CHECKPOINT], ids=["journal", "checkpoint"])
def test_a_fork_goes_its_own_way(wire: Wire, folder: pathlib.Path, level: Any) -> None:
    live = Durable(wire, level, label="first")
    states = live.steps(1, 2)
    live.SaveCheckpoint(name="best")
    states += live.steps(3, 4)
    forked = live.ForkSession(request_id="fork", checkpoint="best", label="second")
    assert (forked.session.applied_step, forked.session.applied_load, forked.replayed) == (2, 1, False)
    assert (forked.session.config.label, forked.session.config.durability) == ("second", level)
    assert live.ForkSession(request_id="fork", checkpoint="best", label="second").replayed
    fork = Durable.__new__(Durable)
    Live.__init__(fork, wire, pb.CreateSessionResponse(session=forked.session, attach_token=forked.attach_token))
    fork.wire = wire
    assert (fork.state(), live.state()) == (states[1], states[3])
    arrays = "checkpoints/{}/state.safetensors"
    one = folder / "sessions" / live.id / arrays.format("best")
    other = folder / "sessions" / fork.id / arrays.format("auto-0000000002-000001")
    assert one.stat().st_ino == other.stat().st_ino
    ahead = fork.steps(3, 4)
    assert (live.state(), ahead[1]) == (states[3], states[3])
    shutil.copytree(folder, image := folder.with_name("image"))
    live.DeleteSession()
    assert fork.state() == ahead[1]
    with numpy_server(data_dir=str(image)) as second, Wire(second.target) as beside:
        live.wire = fork.wire = beside
        if level == JOURNAL:
            assert (live.state(), fork.state()) == (states[3], ahead[1])
        else:
            assert (live.state(), fork.state()) == (states[1], states[1])
        assert beside.get(fork.id).config.label == "second"


def test_a_fork_begins_with_the_present_or_with_a_step_of_the_log(wire: Wire, folder: pathlib.Path) -> None:
    live = Durable(wire)
    states = live.steps(1, 3)
    present = live.ForkSession(request_id="a").session
    earlier = live.ForkSession(request_id="b", step=2, durability=session_pb2.DURABILITY_MEMORY).session
    kept = live.ForkSession(request_id="c", step=1).session
    assert (present.applied_step, earlier.applied_step, kept.applied_step) == (3, 2, 1)
    assert live.state(present.session_id) == states[2]
    assert live.state(earlier.session_id) == states[1]
    assert live.state(kept.session_id) == states[0]
    shutil.copytree(folder, image := folder.with_name("image"))
    with numpy_server(data_dir=str(image)) as second, Wire(second.target) as other:
        live.wire = other
        assert (live.state(present.session_id), live.state(kept.session_id)) == (states[2], states[0])
        assert live.names(kept.session_id) == ["auto-0000000001-000001"]


def test_a_fork_that_fails_leaves_nothing(wire: Wire, folder: pathlib.Path, refusal: Any) -> None:
    live = Durable(wire)
    live.SaveCheckpoint(name="best")
    refusal(lambda: live.ForkSession(request_id="r", checkpoint="none"), "INVALID_ARGUMENT", "INVALID_CONFIG")
    refusal(
        lambda: live.ForkSession(request_id="r", checkpoint="best", label="\x1b"), "INVALID_ARGUMENT", "INVALID_CONFIG"
    )
    (folder / "sessions" / live.id / "checkpoints" / "best" / "state.safetensors").write_bytes(b"")
    refusal(lambda: live.ForkSession(request_id="r", checkpoint="best"), "DATA_LOSS", "CHECKPOINT_DAMAGED")
    assert [path.name for path in (folder / "sessions").iterdir()] == [live.id]
    assert wire.info().sessions == 1


def test_an_automatic_checkpoint_of_the_present_is_not_saved_twice(
    wire: Wire, folder: pathlib.Path, durable: Server
) -> None:
    live = Durable(wire)
    live.steps(1, 2)
    assert durable.registry.checkpoint_all()
    shutil.copytree(folder, image := folder.with_name("image"))
    with numpy_server(data_dir=str(image)) as second:
        assert second.registry.checkpoint_all()
        live_there = second.registry.get(live.id)
        assert (live_there.ledger.applied_step, live_there.ledger.durable_step) == (2, 2)


def test_a_named_checkpoint_leaves_the_automatic_ones_their_times(wire: Wire, durable: Server) -> None:
    live = Durable(wire)
    live.steps(1, 2)
    live.SaveCheckpoint(name="best")
    directory = durable.registry.directory
    assert directory is not None
    directory.checkpointer.checkpoint(durable.registry.get(live.id))
    assert live.names() == ["auto-0000000002-000001", "best"]
    assert np.all([info.step == 2 for info in live.ListCheckpoints().checkpoints])


def test_a_server_that_lost_the_directory_changes_nothing(wire: Wire, folder: pathlib.Path, refusal: Any) -> None:
    live = Durable(wire)
    live.steps(1, 2)
    live.SaveCheckpoint(name="best")
    live.steps(3, 3)
    with numpy_server(data_dir=str(folder)) as second, Wire(second.target) as other:
        calls: list[Callable[[], Any]] = [
            lambda: live.SaveCheckpoint(name="more"),
            lambda: live.DeleteCheckpoint(name="best"),
            lambda: live.rollback(2, checkpoint="best"),
        ]
        for call in calls:
            refusal(call, "FAILED_PRECONDITION", "NOT_PRIMARY")
        with pytest.raises(Refused):
            live.ForkSession(request_id="r", checkpoint="best")
        live.wire = other
        assert (live.names(), other.get(live.id).applied_load) == (["best"], 1)
        assert [path.name for path in (folder / "sessions").iterdir()] == [live.id]
