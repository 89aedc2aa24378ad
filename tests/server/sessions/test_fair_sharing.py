"""Sessions that share an engine: passes of one between those of another, with the bits of a session alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.layout import TensorSpec
from stepwire_server.devices import fair_state
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.fair_share import FairShare
from stepwire_server.devices.pool import Device
from stepwire_server.engines import CpuEngine, Engine
from stepwire_server.engines.cpu.state import CpuState
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config
from tests.server.session_driver import Array, RecordingWriter, apply_step, everything, load, request_of, stage

LARGE, SMALL, PASS = 5 * 512, 300, 512
Until = Callable[[Callable[[], bool]], None]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = CpuEngine(threads=1, use_numba=False)
    yield made
    made.close()


def device_of(engine: Engine, turns: int = 1) -> Device:
    return Device(engine, MemoryBudget(1 << 30), FairShare(turns=turns))


def session_on(device: Device, size: int, **fields: Any) -> Session:
    config = make_config(TensorSpec("w", (size,)), **fields)
    session = Session("ab" * 16, config, device, epoch=1, clock=lambda: 0.0)
    session.acquire()
    return session


def gradient_of(size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


class Passes:
    """The updates of an engine, in the order in which they ran: the sizes of their states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        original, sizes = CpuState.update, self.sizes

        def update(state: CpuState, step: Any, *rest: Any) -> Any:
            sizes.append(state._size)
            return original(state, step, *rest)

        monkeypatch.setattr(CpuState, "update", update)


def background(*calls: Callable[[], Any]) -> Callable[[], None]:
    """Make calls in a thread each; returns a function that waits for them."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()

    def join() -> None:
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive(), "a step waits for what never comes"

    return join


def commit(session: Session, gradient: Array) -> Array:
    request = request_of(session, reply_elements=PASS)
    writer = RecordingWriter(len(gradient), request.reply_dtype)
    with stage(session, request, gradient, [(0, len(gradient))]) as step:
        session.commit(step, writer)
    return writer.values


def test_a_small_step_passes_between_two_passes_of_a_large_one(
    engine: Engine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, passes = device_of(engine), Passes(monkeypatch)
    large, small = session_on(device, LARGE), session_on(device, SMALL)
    outside = device.share.flow(0)
    began = outside.acquire(0, large._state.arrays)
    joins: list[Callable[[], None]] = []
    for count, (session, size) in enumerate(((large, LARGE), (small, SMALL)), 1):
        joins.append(background(lambda session=session, size=size: commit(session, gradient_of(size))))
        until(lambda count=count: device.share.statistics().waiting == count)
    outside.release(began)
    for join in joins:
        join()
    assert passes.sizes == [LARGE, SMALL, LARGE, LARGE, LARGE, LARGE]
    assert large.ledger.applied_step == small.ledger.applied_step == 1
    assert large.engine_seconds > 0.0 < small.engine_seconds


def test_steps_side_by_side_have_the_bits_of_steps_alone(engine: Engine) -> None:
    device = device_of(engine, turns=2)
    beside = [session_on(device, size) for size in (LARGE, SMALL, SMALL)]
    alone = [session_on(device_of(engine), size) for size in (LARGE, SMALL, SMALL)]
    steps = 6

    def work(session: Session, seed: int) -> None:
        for step in range(steps):
            commit(session, gradient_of(session.config.layout.size, 10 * seed + step))

    background(*(lambda each=each, seed=seed: work(each, seed) for seed, each in enumerate(beside)))()
    for seed, session in enumerate(alone):
        work(session, seed)
    for one, other in zip(beside, alone, strict=True):
        assert one.ledger.applied_step == steps
        for slot, values in everything(other)[1].items():
            assert everything(one)[1][slot].tobytes() == values.tobytes()
    assert device.share.statistics() == (0, 0)


def test_a_pass_over_more_than_one_turn_has_the_bits_of_one_pass(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * 256 + 40
    whole, cut = (session_on(device_of(engine), size) for _ in range(2))
    gradient = gradient_of(size)
    expected, reply = apply_step(whole, gradient)
    monkeypatch.setattr(fair_state, "_MOST_ELEMENTS", 256)
    passes = Passes(monkeypatch)
    result, in_turns = apply_step(cut, gradient)
    assert len(passes.sizes) == 4
    assert in_turns.tobytes() == reply.tobytes()
    assert result.update_norm == pytest.approx(expected.update_norm, rel=1e-5)
    assert result.param_norm == pytest.approx(expected.param_norm, rel=1e-5)
    for slot, values in everything(whole)[1].items():
        assert everything(cut)[1][slot].tobytes() == values.tobytes()


def test_a_step_that_fails_in_its_pass_gives_the_turn_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(engine)
    broken, beside = session_on(device, SMALL), session_on(device, SMALL)

    def fail(*_: Any) -> None:
        raise RuntimeError("the kernel failed")

    with monkeypatch.context() as patch:
        patch.setattr(CpuState, "update", fail)
        with pytest.raises(Exception, match="damaged|kernel failed"):
            commit(broken, gradient_of(SMALL))
    assert device.share.statistics() == (0, 0)
    assert not np.isnan(commit(beside, gradient_of(SMALL))).any()


def test_pulls_and_loads_have_turns_too(engine: Engine, until: Until) -> None:
    device = device_of(engine)
    session, outside = session_on(device, SMALL), device.share.flow(0)
    values = gradient_of(SMALL, 3)
    for call in (lambda: load(session, {"param": values}), lambda: everything(session)):
        began = outside.acquire(0, session._state.arrays)
        join = background(call)
        until(lambda: device.share.statistics().waiting == 1)
        outside.release(began)
        join()
    assert everything(session)[1]["param"].tobytes() == values.tobytes()


def test_sums_of_small_chunks_wait_for_no_turn_and_those_of_large_ones_do(
    engine: Engine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(engine)
    session, outside = session_on(device, SMALL), device.share.flow(0)
    began = outside.acquire(0, session._state.arrays)
    stage(session, request_of(session), gradient_of(SMALL), [(0, SMALL)]).close()
    monkeypatch.setattr(fair_state, "_LEAST_BYTES", 4 * SMALL)
    join = background(lambda: stage(session, request_of(session), gradient_of(SMALL), [(0, SMALL)]).close())
    until(lambda: device.share.statistics().waiting == 1)
    outside.release(began)
    join()
    assert device.share.statistics() == (0, 0)


def test_the_end_of_a_session_waits_for_no_turn(engine: Engine) -> None:
    device = device_of(engine)
    session, outside = session_on(device, SMALL), device.share.flow(0)
    began = outside.acquire(0, session._state.arrays)
    session.close()
    outside.release(began)
    assert device.budget.reserved_bytes == 0
