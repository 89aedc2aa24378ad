"""The shared memory of a session: the place of its parameters, the reservations, and the state after a refusal."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError, SessionNotFoundError
from stepwire.layout import TensorSpec
from stepwire.wire.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.host.sealed_memory import in_pages
from stepwire_server.sessions.session import Session
from stepwire_server.sharing.host_buffers import HostBuffers
from stepwire_server.sharing.shared_step import MemoryReplyWriter, stage_shared
from tests.server.configs import make_config
from tests.server.session_driver import apply_step, begin, everything, load, make_session, request_of
from tests.support.raw_handoff import held_by_process

pytestmark = pytest.mark.many

SIZE = 5000
STATE_BYTES = 3 * 4 * SIZE
PAGES = in_pages(4 * SIZE)


@pytest.fixture(scope="module")
def engine() -> Iterator[CpuEngine]:
    with contextlib.closing(CpuEngine(threads=1)) as engine:
        yield engine


class Shared:
    """A session, its budget and its buffers."""

    def __init__(self, engine: CpuEngine, budget_bytes: int = 1 << 30, **fields: Any) -> None:
        self.budget = MemoryBudget(budget_bytes)
        config = make_config(TensorSpec("w", (SIZE,)), **fields)
        self.session = make_session(config, engine, budget=self.budget)

    def step(self, buffers: HostBuffers, gradient: np.ndarray, **fields: Any) -> Any:
        """Apply a step as a stream does."""
        buffers.gradient[:] = gradient
        request = request_of(self.session, shared=True, reply=not buffers.in_place, **fields)
        with begin(self.session, request) as step:
            stage_shared(buffers, step, SIZE, self.session.depth)
            return self.session.commit(step, MemoryReplyWriter(buffers.parameters))


def gradient(step: int, dtype: Any = FLOAT32) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SIZE).astype(np.float32).astype(dtype)


def start(session: Session) -> None:
    load(session, {"param": gradient(99)})


@pytest.mark.parametrize("reply", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_steps_in_shared_memory_are_those_of_messages(engine: CpuEngine, dtype: Any, reply: Any) -> None:
    shared, plain = (Shared(engine, gradient_dtype=dtype, reply_dtype=reply) for _ in range(2))
    start(shared.session)
    start(plain.session)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        assert buffers.in_place == (reply == FLOAT32)
        np.testing.assert_array_equal(buffers.parameters.view(np.uint8), gradient(99, reply).view(np.uint8))
        for step in range(1, 21):
            result = shared.step(buffers, gradient(step, dtype))
            expected, reply = apply_step(plain.session, gradient(step, dtype))
            assert (result.step, result.grad_norm, result.groups) == (step, expected.grad_norm, expected.groups)
            assert buffers.parameters.tobytes() == reply.tobytes()
        snapshots = [everything(each.session) for each in (shared, plain)]
    assert snapshots[0][0] == snapshots[1][0]
    for slot, values in snapshots[1][1].items():
        assert snapshots[0][1][slot].tobytes() == values.tobytes()


def test_memory_is_accounted_for_and_given_back(engine: CpuEngine) -> None:
    before = held_by_process()
    shared = Shared(engine, reply_dtype=BFLOAT16)
    buffers = HostBuffers(shared.session)
    replies = in_pages(2 * SIZE)
    assert (buffers.gradient_bytes, buffers.parameter_bytes) == (PAGES, replies)
    assert shared.budget.reserved_bytes == STATE_BYTES + PAGES + replies
    step = begin(shared.session, request_of(shared.session, shared=True))
    assert shared.budget.reserved_bytes == STATE_BYTES + PAGES + replies  # a shared step reserves nothing
    step.close()
    buffers.close()
    buffers.close()
    assert shared.budget.reserved_bytes == STATE_BYTES
    shared.session.close()
    del buffers, step
    assert (shared.budget.reserved_bytes, held_by_process()) == (0, before)


def test_parameters_in_place_are_the_states_and_stay_there(engine: CpuEngine) -> None:
    before = held_by_process()
    shared = Shared(engine)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as first:
        assert shared.budget.reserved_bytes == STATE_BYTES + PAGES
        inodes = [os.fstat(descriptor).st_ino for descriptor in first.descriptors()]
        shared.step(first, gradient(1))
        after = first.parameters.copy()
    assert shared.budget.reserved_bytes == STATE_BYTES
    with contextlib.closing(HostBuffers(shared.session)) as second:
        again = [os.fstat(descriptor).st_ino for descriptor in second.descriptors()]
        assert (again[0] != inodes[0], again[1] == inodes[1]) == (True, True)
        assert not second.gradient.any()  # nothing of the client before
        np.testing.assert_array_equal(second.parameters, after)
        shared.step(second, gradient(2))
        np.testing.assert_array_equal(second.parameters, everything(shared.session)[1]["param"])
        apply_step(shared.session, gradient(3))  # a step in messages
        np.testing.assert_array_equal(second.parameters, everything(shared.session)[1]["param"])
    del first, second
    assert held_by_process()[1] == before[1] + 1
    shared.session.close()
    assert held_by_process() == before


@pytest.mark.parametrize("slots", [("param",), ("param", "exp_avg", "exp_avg_sq")])
def test_a_load_goes_where_the_client_sees_it(engine: CpuEngine, slots: tuple[str, ...]) -> None:
    shared = Shared(engine)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        shared.step(buffers, gradient(1))
        values = {slot: np.abs(gradient(50 + index)) for index, slot in enumerate(slots)}
        load(shared.session, values)
        np.testing.assert_array_equal(buffers.parameters, values["param"])
        shared.step(buffers, gradient(2))
        np.testing.assert_array_equal(buffers.parameters, everything(shared.session)[1]["param"])


def test_a_replay_writes_the_reply_into_the_memory_of_the_new_stream(engine: CpuEngine) -> None:
    shared = Shared(engine, reply_dtype=BFLOAT16)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as lost:
        shared.step(lost, gradient(1))
        reply = lost.parameters.copy()
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        buffers.parameters[:] = 0
        result = shared.step(buffers, gradient(7), step=1)
        assert (result.step, result.replayed) == (1, True)
        assert buffers.parameters.tobytes() == reply.tobytes()


def test_int8_gradients_lie_there_in_their_blocks(engine: CpuEngine) -> None:
    shared = Shared(engine, gradient_dtype=INT8)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        blocks = -(-SIZE // 256)
        assert (len(buffers.gradient), buffers.gradient_bytes) == (blocks, in_pages(260 * blocks))
        with begin(shared.session, request_of(shared.session, shared=True, reply=False)) as step:
            stage_shared(buffers, step, SIZE, 1)
            step.gradient.complete()
            assert step.gradient.squared_norms() == [0.0]


def test_the_pattern_is_looked_for_where_the_gradient_lies(engine: CpuEngine) -> None:
    shared = Shared(engine)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        pattern = bytes(range(64))
        buffers.gradient.view(np.uint8)[:64] = np.frombuffer(pattern, np.uint8)
        assert buffers.check(pattern) == gradient(99).tobytes()[:64]
        assert buffers.check(pattern[:16]) == gradient(99).tobytes()[:16]
        assert buffers.check(bytes(64)) is None


def test_a_tensor_of_nothing_can_be_shared(engine: CpuEngine) -> None:
    session = make_session(make_config(TensorSpec("nothing", (0, 3))), engine)
    with contextlib.closing(HostBuffers(session)) as buffers:
        assert (len(buffers.gradient), len(buffers.parameters)) == (0, 0)
        assert buffers.check(bytes(16)) == bytes(16)
        with begin(session, request_of(session, shared=True, reply=False)) as step:
            stage_shared(buffers, step, 0, 1)
            assert session.commit(step, MemoryReplyWriter(buffers.parameters)).step == 1


@pytest.mark.parametrize("room", [0, PAGES - 1, PAGES, 2 * PAGES - 1])
@pytest.mark.parametrize("reply", [FLOAT32, BFLOAT16])
def test_a_budget_without_room_leaves_everything_as_it_was(engine: CpuEngine, room: int, reply: Any) -> None:
    needed = PAGES + (PAGES if reply == FLOAT32 else in_pages(2 * SIZE))
    shared = Shared(engine, budget_bytes=STATE_BYTES + max(room, 4 * SIZE), reply_dtype=reply)
    start_room = shared.budget.limit_bytes - STATE_BYTES
    before = held_by_process()
    if start_room >= needed:
        with contextlib.closing(HostBuffers(shared.session)):
            pass
    else:
        with pytest.raises(ResourceExhaustedError) as refused:
            HostBuffers(shared.session)
        assert "shared memory" in str(refused.value)
        del refused
        assert held_by_process() == before
    assert shared.budget.reserved_bytes == STATE_BYTES
    assert apply_step(shared.session, gradient(1))[0].step == 1


@pytest.mark.parametrize("call", ["os.memfd_create", "os.posix_fallocate", "os.dup", "mmap.mmap"])
@pytest.mark.parametrize("reply", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("after", [0, 1])
def test_a_system_without_room_leaves_everything_as_it_was(
    engine: CpuEngine, call: str, reply: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call of a kind fails when half is made."""
    shared = Shared(engine, reply_dtype=reply)
    start(shared.session)
    module, name = call.split(".")
    original, calls = getattr(__import__(module), name), []

    def refuse(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return original(*arguments, **options)

    before = held_by_process()
    with monkeypatch.context() as patch:
        patch.setattr(f"stepwire_server.host.sealed_memory.{call}", refuse)
        with contextlib.suppress(OSError):
            HostBuffers(shared.session).close()
        failed = len(calls) > after
    assert failed or call == "os.dup"
    assert shared.budget.reserved_bytes == STATE_BYTES
    moved = int(shared.session.memory.moved_parameters() is not None)
    assert held_by_process()[1] - before[1] == moved
    np.testing.assert_array_equal(everything(shared.session)[1]["param"], gradient(99))
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        shared.step(buffers, gradient(1))
    shared.session.close()


def test_a_session_that_has_ended_shares_nothing_and_its_memory_can_still_be_written(engine: CpuEngine) -> None:
    shared = Shared(engine)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        shared.session.close()
        shared.session.close()
        assert all(os.fstat(descriptor).st_size == PAGES for descriptor in buffers.descriptors())
        buffers.gradient[:] = 1.0
        np.testing.assert_array_equal(buffers.parameters, gradient(99))
        with pytest.raises(SessionNotFoundError):
            HostBuffers(shared.session)
        with pytest.raises(SessionNotFoundError):
            shared.step(buffers, gradient(1))
    assert shared.budget.reserved_bytes == 0


def test_a_gradient_that_becomes_finite_while_it_is_looked_at_was_not(
    engine: CpuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that scribbles spoils its own step and gets no error of the server's."""
    shared = Shared(engine)
    start(shared.session)
    with contextlib.closing(HostBuffers(shared.session)) as buffers:
        state = shared.session._state.arrays
        original = type(state).fetch

        def mended(*arguments: Any) -> Any:
            buffers.gradient[:] = 1.0
            return original(*arguments)

        monkeypatch.setattr(type(state), "fetch", mended)
        spoilt = gradient(1)
        spoilt[7] = np.nan
        with pytest.raises(Exception, match="holds NaN or Inf") as refused:
            shared.step(buffers, spoilt)
        assert refused.value.metadata["non_finite_count"] == "1"  # type: ignore[attr-defined]
        monkeypatch.undo()
        assert shared.step(buffers, gradient(1)).step == 1
