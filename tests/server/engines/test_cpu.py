from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.engines.cpu import GRAIN, LEAST_SHARED_SUM, LEAST_SHARED_UPDATE
from stepwire_server.rules import ALL_RULES

RULE = ALL_RULES[0]
SLOTS = (PARAM, *RULE.slots)
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    with_numba = CpuEngine(threads=2, use_numba=request.param == "numba")
    yield with_numba
    with_numba.close()


def fill(state, arrays) -> None:
    for slot in SLOTS:
        state.write(slot, 0, arrays[slot])


def contents(state, size: int) -> dict[str, np.ndarray]:
    arrays = {slot: np.empty(size, np.float32) for slot in SLOTS}
    for slot, array in arrays.items():
        state.read(slot, 0, array)
    return arrays


def test_device_is_this_machine(engine) -> None:
    assert engine.device.name == "cpu"
    assert engine.device.description
    assert engine.device.memory_bytes > 1 << 20


def test_allocated_arrays_are_zero_and_counted(engine) -> None:
    state = engine.allocate(SLOTS, 1000)
    assert state.nbytes == 3 * 4 * 1000
    assert all((array == 0.0).all() for array in contents(state, 1000).values())
    state.close()
    state.close()
    assert state.nbytes == 0


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 70])
def test_too_much_memory_is_an_error_with_the_numbers(engine, size: int) -> None:
    with pytest.raises(ResourceExhaustedError, match=str(size)) as caught:
        engine.allocate(SLOTS, size)
    assert caught.value.metadata["needed_bytes"] == str(12 * size)


def test_staged_chunks_stay_where_they_were_received(engine) -> None:
    message = np.zeros(67, np.uint8)
    payload = message[3:].view(np.float32)
    chunk = engine.allocate(SLOTS, 4).stage(payload)
    assert np.shares_memory(chunk.values, message)
    assert (chunk.dtype, len(chunk)) == (FLOAT32, 16)
    assert payload.flags.writeable, "the receiver's own view is untouched"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_read_and_write_convert_unaligned_ranges(engine, name, wire, unaligned, assert_same_bits) -> None:
    values = (np.random.default_rng(0).standard_normal(40_000) * 1e5).astype(np.float32)
    with np.errstate(over="ignore"):
        encoded = values.astype(wire[name])
    state = engine.allocate((PARAM,), 40_010)
    state.write(PARAM, 7, unaligned(encoded))
    whole = np.empty(40_010, np.float32)
    state.read(PARAM, 0, whole)
    assert_same_bits(whole[7:-3], encoded.astype(np.float32))
    assert (whole[:7] == 0).all() and (whole[-3:] == 0).all()
    state.write(PARAM, 0, values)
    out = np.empty(39_999 * wire[name].itemsize + 1, np.uint8)[1:].view(wire[name])
    state.read(PARAM, 1, out)
    assert_same_bits(out.copy(), encoded[1:])


def test_adopt_takes_the_slots_of_the_other_and_leaves_it_empty(engine, make_arrays) -> None:
    arrays = make_arrays(RULE, 100)
    state, other = engine.allocate(SLOTS, 100), engine.allocate((PARAM,), 100)
    fill(state, arrays)
    other.write(PARAM, 0, arrays["gradient"])
    state.adopt(other)
    assert (other.nbytes, state.nbytes) == (0, 1200)
    got = contents(state, 100)
    assert (got[PARAM] == arrays["gradient"]).all()
    assert all((got[slot] == arrays[slot]).all() for slot in RULE.slots)


def test_ranges_outside_the_arrays_are_refused(engine, scalars_of) -> None:
    state = engine.allocate(SLOTS, 10)
    chunk, out = state.stage(np.ones(6, np.float32)), np.empty(6, np.float32)
    scalars = scalars_of(RULE)
    for start, begin, end, answer in [
        (0, 0, 7, None),
        (0, -1, 3, None),
        (0, 4, 2, None),
        (5, 0, 6, None),
        (-1, 0, 6, None),
        (0, 0, 6, out[:5]),
    ]:
        with pytest.raises(IndexError):
            state.update(RULE, scalars, start, chunk, begin, end, answer)
    with pytest.raises(IndexError):
        state.sum_of_squares(chunk, 0, 7)
    with pytest.raises(IndexError):
        state.read(PARAM, 5, out)
    with pytest.raises(IndexError):
        state.write(PARAM, -1, out)
    assert all((array == 0.0).all() for array in contents(state, 10).values())


def test_results_do_not_depend_on_the_number_of_threads(make_arrays, scalars_of, assert_same_bits) -> None:
    pytest.importorskip("numba")
    size = max(LEAST_SHARED_SUM, LEAST_SHARED_UPDATE) + 3 * GRAIN + 17
    arrays = make_arrays(RULE, size)
    results = []
    for threads in (1, 2, 3, 64):
        engine = CpuEngine(threads, use_numba=True)
        state, out = engine.allocate(SLOTS, size), np.empty(size - 9, np.float32)
        fill(state, arrays)
        chunk = state.stage(arrays["gradient"])
        state.update(RULE, scalars_of(RULE), 5, chunk, 9, size, out[: size - 9])
        results.append(({**contents(state, size), "out": out}, state.sum_of_squares(chunk, 1, size)))
        engine.close()
        engine.close()
    for other, total in results[1:]:
        assert total == results[0][1]
        for name, array in other.items():
            assert_same_bits(array, results[0][0][name], name)


def test_sessions_may_step_at_the_same_time(make_arrays, scalars_of, assert_same_bits) -> None:
    pytest.importorskip("numba")
    size, engine = LEAST_SHARED_UPDATE + 1, CpuEngine(threads=3, use_numba=True)
    arrays = make_arrays(RULE, size)
    states = [engine.allocate(SLOTS, size) for _ in range(5)]
    barrier = threading.Barrier(len(states))

    def work(state) -> None:
        fill(state, arrays)
        chunk = state.stage(arrays["gradient"])
        barrier.wait()
        for t in range(1, 6):
            state.update(RULE, scalars_of(RULE, t), 0, chunk, 0, size, None)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = contents(states[0], size)
    for state in states[1:]:
        for slot, array in contents(state, size).items():
            assert_same_bits(array, first[slot], slot)
    engine.close()


def test_steps_leave_no_memory_behind(engine, make_arrays, scalars_of) -> None:
    arrays = make_arrays(RULE, 5000)
    state, out = engine.allocate(SLOTS, 5000), np.empty(5000, np.float32)
    scalars = scalars_of(RULE)

    def steps(count: int) -> None:
        for _ in range(count):
            chunk = state.stage(arrays["gradient"])
            state.sum_of_squares(chunk, 0, 5000)
            state.update(RULE, scalars, 0, chunk, 0, 5000, out)

    steps(3)
    tracemalloc.start()
    try:
        steps(3)
        before, _ = tracemalloc.get_traced_memory()
        steps(100)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2000


def test_prepared_kernels_are_not_compiled_again(monkeypatch, scalars_of) -> None:
    numba_kernels = pytest.importorskip("stepwire_server.engines.numba_kernels", exc_type=ImportError)
    engine = CpuEngine(threads=1, use_numba=True)
    engine.prepare(RULE, FLOAT32, FLOAT32)
    engine.prepare(RULE, FLOAT32, None)

    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("compiled within a step")

    monkeypatch.setattr(numba_kernels, "_load", compiled)
    state = engine.allocate(SLOTS, 8)
    for payload in (np.ones(8, np.float32), np.frombuffer(b"." + bytes(32), np.uint8)[1:].view(np.float32)):
        chunk = state.stage(payload)
        assert state.sum_of_squares(chunk, 0, 8) == float(np.sum(payload))
        for out in (None, np.empty(8, np.float32), np.empty(33, np.uint8)[1:].view(np.float32)):
            state.update(RULE, scalars_of(RULE), 0, chunk, 0, 8, out)


def test_infinite_parameters_survive(engine, scalars_of) -> None:
    state = engine.allocate(SLOTS, 3)
    state.write(PARAM, 0, np.array([np.inf, -np.inf, 1.0], np.float32))
    out = np.empty(3, np.float32)
    state.update(RULE, scalars_of(RULE), 0, state.stage(np.ones(3, np.float32)), 0, 3, out)
    assert out[:2].tolist() == [np.inf, -np.inf]


def test_numpy_stands_in_where_numba_is_missing(monkeypatch, scalars_of) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine = CpuEngine()
    assert type(engine._kernels).__name__ == "NumpyKernels"
    state, out = engine.allocate(SLOTS, 2), np.empty(2, np.float32)
    state.update(RULE, scalars_of(RULE, 1), 0, state.stage(np.ones(2, np.float32)), 0, 2, out)
    assert out == pytest.approx(-0.02, rel=1e-4)


def test_importing_engines_loads_neither_cupy_nor_grpc_nor_numba() -> None:
    script = (
        "import sys, stepwire_server.engines, stepwire_server.rules;"
        "stepwire_server.engines.CpuEngine(use_numba=False);"
        "print(sorted({'cupy', 'grpc', 'numba', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
