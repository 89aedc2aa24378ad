"""The GPU engine on a stand-in for CuPy that runs the generated kernels on the processor."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire_server.engines import PARAM, CudaEngine, Device
from stepwire_server.rules import ALL_RULES

RULE = ALL_RULES[0]
SLOTS = (PARAM, *RULE.slots)
FLOAT32 = np.dtype(np.float32)


def test_device_is_described(fake_cupy) -> None:
    assert CudaEngine(1, fake_cupy()).device == Device("cuda:1", "Pretended GPU", 1 << 30)


@pytest.mark.parametrize(("gradient", "reply"), [("float32", "float32"), ("bfloat16", "float16"), ("float16", None)])
def test_a_step_through_its_own_modules_is_that_of_the_cpu(fake_cupy, check_same, wire, gradient, reply) -> None:
    check_same(CudaEngine(cupy=fake_cupy()), RULE, wire[gradient], wire.get(reply))


def test_state_outlives_many_steps(fake_cupy, numpy_engine, make_arrays, scalars_of, assert_same_bits) -> None:
    arrays, results = make_arrays(RULE, 700), []
    for engine in (CudaEngine(cupy=fake_cupy()), numpy_engine):
        state, out = engine.allocate(SLOTS, 700), np.empty(350, np.float32)
        state.write(PARAM, 0, arrays["param"])
        chunk = state.stage(arrays["gradient"])
        for t in range(1, 11):
            for start in (0, 350):
                state.update(RULE, scalars_of(RULE, t), start, chunk, start, start + 350, out)
        moment = np.empty(700, np.float32)
        state.read("exp_avg_sq", 0, moment)
        results.append((out, moment))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


def test_allocated_arrays_are_zero_and_counted(fake_cupy) -> None:
    state = CudaEngine(cupy=fake_cupy()).allocate(SLOTS, 100)
    assert state.nbytes == 3 * 400
    for slot in SLOTS:
        out = np.ones(100, np.float32)
        state.read(slot, 0, out)
        assert (out == 0.0).all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_read_and_write_convert(fake_cupy, wire, unaligned, assert_same_bits, name) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(wire[name])
    state = CudaEngine(cupy=fake_cupy()).allocate((PARAM,), 1003)
    state.write(PARAM, 2, unaligned(values))
    whole, part = np.empty(1003, np.float32), np.empty(999 * values.itemsize + 1, np.uint8)[1:].view(values.dtype)
    state.read(PARAM, 0, whole)
    assert_same_bits(whole[2:-1], values.astype(np.float32))
    assert whole[[0, 1, -1]].tolist() == [0.0, 0.0, 0.0]
    state.read(PARAM, 3, part)
    assert_same_bits(part.copy(), values[1:])


def test_out_of_memory_says_how_much_was_wanted_and_where(fake_cupy) -> None:
    cupy = fake_cupy(memory_bytes=10_000)
    engine = CudaEngine(1, cupy)
    with pytest.raises(
        ResourceExhaustedError, match=r"cuda:1 \(Pretended GPU\) for 3 arrays of 1000 float32"
    ) as caught:
        engine.allocate(SLOTS, 1000)
    assert caught.value.metadata == {"needed_bytes": "12000", "device": "cuda:1"}
    caught.value.__traceback__ = caught.value.__cause__ = None
    assert cupy.used_bytes == 0 and cupy.freed == 1
    assert engine.allocate(SLOTS, 100).nbytes == 1200


def test_ranges_outside_the_arrays_are_refused(fake_cupy, scalars_of) -> None:
    state = CudaEngine(cupy=fake_cupy()).allocate(SLOTS, 10)
    chunk = state.stage(np.ones(6, np.float32))
    for start, begin, end, out in [(0, 0, 7, None), (5, 0, 6, None), (0, 0, 6, np.empty(5, np.float32))]:
        with pytest.raises(IndexError):
            state.update(RULE, scalars_of(RULE), start, chunk, begin, end, out)
    with pytest.raises(IndexError):
        state.sum_of_squares(chunk, 0, 7)
    with pytest.raises(IndexError):
        state.read(PARAM, 9, np.empty(2, np.float32))
    with pytest.raises(IndexError):
        state.write(PARAM, -1, np.empty(2, np.float32))


def test_prepare_compiles_each_module_once(fake_cupy, scalars_of) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    engine.prepare(RULE, FLOAT32, FLOAT32)
    engine.prepare(RULE, FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 2, "one module to update, one to sum"
    state = engine.allocate(SLOTS, 3)
    chunk = state.stage(np.ones(3, np.float32))
    state.update(RULE, scalars_of(RULE), 0, chunk, 0, 3, np.empty(3, np.float32))
    assert state.sum_of_squares(chunk, 0, 3) == 3.0
    assert len(cupy.compiled) == 2


def test_adopt_takes_the_slots_of_the_other_and_frees_its_own(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    state, other = engine.allocate(SLOTS, 4), engine.allocate((PARAM,), 4)
    other.write(PARAM, 0, np.full(4, 2.0, np.float32))
    assert cupy.used_bytes == 4 * 16
    state.adopt(other)
    out = np.empty(4, np.float32)
    state.read(PARAM, 0, out)
    assert out.tolist() == [2.0] * 4
    assert (other.nbytes, state.nbytes, cupy.used_bytes) == (0, 48, 48)


def test_closing_gives_memory_back_and_twice_is_harmless(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    state = engine.allocate(SLOTS, 4)
    for closed in (state, state, engine, engine):
        closed.close()
    assert (state.nbytes, cupy.used_bytes) == (0, 0)
    assert cupy.freed == 4


def test_any_thread_may_call(fake_cupy, scalars_of) -> None:
    """The current device is a matter of the thread; the stand-in refuses calls where none is set."""
    engine, failures = CudaEngine(cupy=fake_cupy()), []
    state = engine.allocate(SLOTS, 3)

    def work() -> None:
        try:
            chunk = state.stage(np.ones(3, np.float32))
            state.update(RULE, scalars_of(RULE), 0, chunk, 0, 3, np.empty(3, np.float32))
            assert state.sum_of_squares(chunk, 0, 3) == 3.0
            state.close()
        except BaseException as problem:
            failures.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
