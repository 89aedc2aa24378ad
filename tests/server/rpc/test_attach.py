"""One attached stream: the chunks of replies, and commits that outlive their client. Bad messages: `test_bad_steps`."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire_server.engines.cpu.engine import CpuState
from tests.server.rpc.streams import step_messages

CHUNK_BYTES = 64 << 10
PATIENCE_SECONDS = 120.0
DTYPES = {1: np.float32, 2: ml_dtypes.bfloat16, 3: np.float16}


@pytest.mark.parametrize("chunk_bytes", [0, 4096, 4097, CHUNK_BYTES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_reply_is_cut_as_it_was_asked_for(large: Any, dtype: int, chunk_bytes: int) -> None:
    begin = step_pb2.StepBegin(step=1, reply={"dtype": dtype, "chunk_bytes": chunk_bytes})  # type: ignore[arg-type]
    *chunks, last = large.attach(*step_messages(large, begin, elements=16_384))
    most = (chunk_bytes or CHUNK_BYTES) // np.dtype(DTYPES[dtype]).itemsize
    covered = 0
    for chunk in chunks:
        assert (chunk.chunk.offset, chunk.HasField("result")) == (covered, False)
        assert 1 <= chunk.chunk.count <= most
        assert len(chunk.payload) == chunk.chunk.count * np.dtype(DTYPES[dtype]).itemsize
        covered += chunk.chunk.count
    assert covered == large.size
    assert (last.result.step, last.payload) == (1, b"")
    masters = np.frombuffer(large.wire.pull(large.id, "param")[1]["param"], np.float32)
    assert b"".join(chunk.payload for chunk in chunks) == masters.astype(DTYPES[dtype]).tobytes()


def test_a_large_step_is_replayed_like_a_small_one(large: Any) -> None:
    first = large.attach(*step_messages(large, step_pb2.StepBegin(step=1)))
    before = large.fingerprint()
    asked = pb.AttachRequest(begin=step_pb2.StepBegin(step=1), commit=step_pb2.StepCommit())
    again = large.attach(asked)
    assert b"".join(chunk.payload for chunk in again) == b"".join(chunk.payload for chunk in first)
    assert again[-1].result.replayed
    again[-1].result.replayed = False
    assert again[-1].result == first[-1].result
    assert large.fingerprint() == before


def test_large_and_unary_and_small_steps_are_the_same_step(wire: Any, make_config: Any, make_live: Any) -> None:
    lives = [make_live(wire, wire.create(make_config((100,)))) for _ in range(3)]
    for step in (1, 2, 3):
        lives[0].attach(*step_messages(lives[0], step_pb2.StepBegin(step=step), elements=7))
        wire.unary("Step", lives[1].unary_step(step))
        lives[2].step(step)
    states = [wire.pull(live.id, "param", "exp_avg", "exp_avg_sq") for live in lives]
    assert states[0] == states[1] == states[2]


def test_a_small_step_is_one_message_each_way(live: Any) -> None:
    (answer,) = live.attach(live.frame(begin=2, commit=True))
    assert (answer.chunk.offset, answer.chunk.count, answer.result.step) == (0, live.size, 2)
    assert len(answer.payload) == 4 * live.size


@pytest.mark.parametrize("unary", [False, True])
def test_no_reply_is_sent_where_none_is_wanted(live: Any, unary: bool) -> None:
    begin = step_pb2.StepBegin(step=2, reply={"mode": step_pb2.REPLY_MODE_NONE})
    if unary:
        answer = pb.StepResponse.FromString(live.wire.unary("Step", live.unary_step(2, begin=begin)))
    else:
        (answer,) = live.attach(live.frame(begin=begin, commit=True))
        assert not answer.HasField("chunk")
    assert (answer.result.step, answer.payload) == (2, b"")
    assert live.wire.pull(live.id, "param")[0].step == 2


def test_steps_follow_each_other_on_one_stream_with_settings_of_their_own(live: Any) -> None:
    """Settings are decoded once for steps that have the same; another step's must not stick."""
    frames = []
    for step, fields in enumerate(({}, {"lr": 0.5}, {}, {}, {"lr": 0.5}, {"lr": 0.25}), 2):
        begin = step_pb2.StepBegin(step=step)
        if fields:
            begin.hyperparameters.add(**fields)
        frames.append(live.frame(begin=begin, commit=True))
    answers = live.attach(*frames)
    assert [answer.result.step for answer in answers] == [2, 3, 4, 5, 6, 7]
    used = [[group.hyperparameters.lr for group in answer.result.telemetry.groups] for answer in answers]
    assert used == [[1e-3] * 2, [0.5] * 2, [1e-3] * 2, [1e-3] * 2, [0.5] * 2, [0.25] * 2]


def test_the_time_of_sending_a_reply_is_told_with_the_next_of_the_stream(live: Any) -> None:
    for first in (2, 4):
        answers = live.attach(*(live.frame(begin=step, commit=True) for step in (first, first + 1)))
        told = [answer.result.telemetry for answer in answers]
        assert [telemetry.HasField("previous_send_seconds") for telemetry in told] == [False, True]
        assert 0.0 <= told[1].previous_send_seconds < PATIENCE_SECONDS


def test_messages_without_content_are_allowed_inside_a_step(live: Any) -> None:
    begin = pb.AttachRequest(begin=step_pb2.StepBegin(step=2))
    empty, padded = pb.AttachRequest(), pb.AttachRequest(padding=b"ignored")
    (answer,) = live.attach(begin, empty, padded, live.frame(), empty, pb.AttachRequest(commit=step_pb2.StepCommit()))
    assert answer.result.step == 2


def test_a_commit_outlives_its_client(large: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way through the update the client is cut off; the step is then applied whole, and is a replay to come."""
    inside, go_on = threading.Event(), threading.Event()
    update = CpuState.update

    def waiting(state: CpuState, step: Any, start: int, *arguments: Any) -> tuple[float, ...]:
        if start:
            inside.set()
            assert go_on.wait(PATIENCE_SECONDS)
        return update(state, step, start, *arguments)

    monkeypatch.setattr(CpuState, "update", waiting)
    stream = large.wire.open()
    stream.send(large.opening())
    large.attached(stream.receive())
    stream.send(*step_messages(large, step_pb2.StepBegin(step=1)))
    assert inside.wait(PATIENCE_SECONDS)
    stream.cancel()
    go_on.set()
    until(lambda: large.wire.get(large.id).applied_step == 1)
    monkeypatch.undo()
    header, values = large.wire.pull(large.id, "param")
    assert list(header.tensor_steps) == [1]
    np.testing.assert_allclose(
        np.frombuffer(values["param"], np.float32), -1e-3 * np.sign(large.gradient(1)), rtol=1e-3
    )
    asked = pb.AttachRequest(begin=step_pb2.StepBegin(step=1), commit=step_pb2.StepCommit())
    assert large.attach(asked)[-1].result.replayed


def test_a_stream_that_ends_before_its_commit_leaves_no_trace(live: Any, until: Any) -> None:
    before, reserved = live.fingerprint(), live.wire.reserved_bytes()
    stream = live.wire.open()
    stream.send(live.opening(), live.frame(begin=2))
    until(lambda: live.wire.reserved_bytes() == reserved + 4 * live.size)
    stream.cancel()
    until(lambda: live.wire.reserved_bytes() == reserved)
    assert live.fingerprint() == before
