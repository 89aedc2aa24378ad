from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import threading
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire.optimizers.norms import RELATIVE_ERROR
from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.engines.cpu.state import LEAST_SHARED_SUM, LEAST_SHARED_UPDATE
from stepwire_server.engines.protocol import GRAIN
from stepwire_server.rules import ACCUMULATED, ALL_RULES, AVERAGE, Decay, Precision, Recipe
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.rules.layerwise import LAMB
from tests.support.pairwise import combinations, missing, pairwise

RECIPE = Recipe(ALL_RULES[0])
FULL = Recipe(ALL_RULES[0], accumulates=True, averages=True, measures=True, precision=Precision.BFLOAT16)
SLOTS = dict.fromkeys((PARAM, *RECIPE.slots), Precision.FLOAT32)
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    with_numba = CpuEngine(threads=2, use_numba=request.param == "numba")
    yield with_numba
    with_numba.close()


def test_device_is_this_machine(engine) -> None:
    assert engine.device.name == "cpu"
    assert engine.device.description
    assert engine.device.memory_bytes > 1 << 20


def test_allocated_arrays_are_zero_and_counted(engine, contents, slots_of) -> None:
    for recipe, bytes_an_element in [(RECIPE, 12), (FULL, 4 + 2 * 2 + 4 + 4)]:
        slots = slots_of(recipe)
        state = engine.allocate(slots, 1000)
        assert state.nbytes == engine.state_bytes(slots, 1000) == 1000 * bytes_an_element
        assert all((array == 0.0).all() for array in contents(state, slots, 1000).values())
        state.close()
        state.close()
        assert state.nbytes == 0


def test_statistics_count_what_is_allocated_and_not_closed(engine) -> None:
    before = engine.statistics()
    state = engine.allocate(SLOTS, 1000)
    during = engine.statistics()
    state.close()
    assert (during.allocated_bytes - before.allocated_bytes, during.threads) == (12_000, 2)
    assert engine.statistics() == before == (before.allocated_bytes, 0, 0, 2, 0, 0)


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 70])
def test_too_much_memory_is_an_error_with_the_numbers(engine, size: int) -> None:
    with pytest.raises(ResourceExhaustedError, match=str(size)) as caught:
        engine.allocate(SLOTS, size)
    assert str(caught.value.metadata["needed_bytes"]) == str(12 * size)


def test_staged_chunks_stay_where_they_were_received(engine) -> None:
    message = np.zeros(67, np.uint8)
    payload = message[3:].view(np.float32)
    chunk = engine.allocate(SLOTS, 4).receive().put(0, payload)
    assert np.shares_memory(chunk.values, message)
    assert (chunk.dtype, len(chunk)) == (FLOAT32, 16)
    assert payload.flags.writeable, "the receiver's own view is untouched"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_read_and_write_convert_unaligned_ranges(engine, name, wire, unaligned, assert_same_bits) -> None:
    values = (np.random.default_rng(0).standard_normal(40_000) * 1e5).astype(np.float32)
    with np.errstate(over="ignore"):
        encoded = values.astype(wire[name])
    state = engine.allocate({PARAM: Precision.FLOAT32}, 40_010)
    state.write(PARAM, 7, unaligned(encoded))
    whole = np.empty(40_010, np.float32)
    state.read(PARAM, 0, whole).wait()
    assert_same_bits(whole[7:-3], encoded.astype(np.float32))
    assert (whole[:7] == 0).all() and (whole[-3:] == 0).all()
    state.write(PARAM, 0, values)
    out = np.empty(39_999 * wire[name].itemsize + 1, np.uint8)[1:].view(wire[name])
    state.read(PARAM, 1, out).wait()
    assert_same_bits(out.copy(), encoded[1:])


def test_adopt_takes_the_slots_of_the_other_and_leaves_it_empty(engine, make_arrays, fill, contents) -> None:
    arrays = make_arrays(RECIPE, 100)
    state, other = engine.allocate(SLOTS, 100), engine.allocate({PARAM: Precision.FLOAT32}, 100)
    fill(state, arrays)
    other.write(PARAM, 0, arrays["gradient"])
    state.adopt(other)
    assert (other.nbytes, state.nbytes) == (0, 1200)
    got = contents(state, SLOTS, 100)
    assert (got[PARAM] == arrays["gradient"]).all()
    assert all((got[slot] == arrays[slot]).all() for slot in RECIPE.slots)


def test_a_step_follows_slots_that_were_adopted_or_moved(engine, pass_of, make_arrays, fill, contents) -> None:
    """What a state remembers of the step before is forgotten where its arrays change."""
    arrays, size = make_arrays(RECIPE, 100), 100
    state, memory = engine.allocate(SLOTS, size), np.empty(size, np.float32)
    chunk, step = state.receive().put(0, arrays["gradient"].astype(np.float32)), pass_of(RECIPE)
    state.update(step, 0, chunk, 0, size, None).wait()
    for change in ("adopt", "move"):
        other = engine.allocate(SLOTS, size)
        fill(other, arrays)
        state.adopt(other) if change == "adopt" else state.move(PARAM, memory)
        expected = engine.allocate(SLOTS, size)
        fill(expected, contents(state, SLOTS, size))
        for each in (state, expected):
            each.update(step, 0, chunk, 0, size, None).wait()
        got, wanted = contents(state, SLOTS, size), contents(expected, SLOTS, size)
        assert all((got[slot] == wanted[slot]).all() for slot in SLOTS), change
    assert (memory == got[PARAM]).all()


KINDS = {
    "recipe": [RECIPE, Recipe(ALL_RULES[0], decay=Decay.BEFORE), Recipe(ALL_RULES[0], measures=True)],
    "sent": ["float32", "bfloat16", "float16"],
    "reply": ["float32", "bfloat16", "float16", None],
}


def test_kinds_have_every_pair_of_values() -> None:
    assert missing(combinations(KINDS), pairwise(KINDS)) == []


@pytest.mark.slow
def test_steps_of_other_kinds_do_not_use_each_others_kernels(engine, pass_of, make_arrays, fill, wire) -> None:
    """Recipes, encodings of gradients and of replies alternate, and each step does what it does alone."""
    arrays, size = make_arrays(RECIPE, 100), 100
    kinds = [tuple(row.values()) for row in pairwise(KINDS)]

    def stepped(state, recipe, sent, reply):
        fill(state, arrays)
        chunk = state.receive().put(0, arrays["gradient"].astype(wire[sent]))
        out = None if reply is None else np.zeros(size, wire[reply])
        sums = state.update(pass_of(recipe), 0, chunk, 0, size, out).wait()
        return sums, None if out is None else out.tobytes()

    shared = engine.allocate(SLOTS, size)
    for kind in (*kinds, *reversed(kinds)):
        assert stepped(shared, *kind) == stepped(engine.allocate(SLOTS, size), *kind), kind


def test_ranges_outside_the_arrays_are_refused(engine, pass_of, slots_of, contents) -> None:
    slots = slots_of(FULL)
    state = engine.allocate(slots, 10)
    chunk, out = state.receive().put(0, np.ones(6, np.float32)), np.empty(6, np.float32)
    step, layerwise = pass_of(FULL), pass_of(Recipe(LAMB, accumulates=True, averages=True))
    for start, begin, end, answer in [
        (0, 0, 7, None),
        (0, -1, 3, None),
        (0, 4, 2, None),
        (5, 0, 6, None),
        (-1, 0, 6, None),
        (10, 0, 1, None),
        (0, 0, 6, out[:5]),
    ]:
        with pytest.raises(IndexError):
            state.update(step, start, chunk, begin, end, answer).wait()
        if answer is None:
            with pytest.raises(IndexError):
                state.accumulate(start, chunk, begin, end, 1.0)
            with pytest.raises(IndexError):
                state.measure(layerwise, start, chunk, begin, end).wait()
            with pytest.raises(IndexError):
                state.fetch_direction(layerwise, start, chunk, begin, end)
            with pytest.raises(IndexError):
                state.sum_of_squares(chunk, begin, end, 1.0, start).wait()
            with pytest.raises(IndexError):
                state.fetch(chunk, begin, end, 1.0, start)
    for call in (state.sum_of_squares, state.fetch):
        with pytest.raises(IndexError):
            call(chunk, 0, 7, 1.0)
    with pytest.raises(IndexError):
        state.read(PARAM, 5, out).wait()
    with pytest.raises(IndexError):
        state.write(PARAM, -1, out)
    state.close()
    with pytest.raises(IndexError):
        state.update(step, 0, chunk, 0, 6, None).wait()


def test_sums_of_squares_are_as_exact_as_norms_need(engine) -> None:
    """Random values, and one block of the most roundings there are; squares span the range of float32."""
    random = np.random.default_rng(6)
    spread = (random.standard_normal(300_007) * 10.0 ** random.uniform(-22, 19, 300_007)).astype(np.float32)
    state = engine.allocate({PARAM: Precision.FLOAT32}, 300_007)
    for values in (
        random.standard_normal(300_007).astype(np.float32),
        spread,
        np.full(65_536, 1.0 + 2.0**-23, np.float32),
        np.full(70_000, 1e-45, np.float32),
    ):
        for begin in (0, 1, 65_535):
            exact = exact_sum_of_squares([values[begin:]])
            total = state.sum_of_squares(state.receive().put(0, values), begin, len(values), 1.0).wait()
            assert abs(Fraction(total) - exact) <= Fraction(RELATIVE_ERROR) * exact


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(
    make_arrays, pass_of, slots_of, fill, contents, assert_same_bits
) -> None:
    pytest.importorskip("numba")
    size = max(LEAST_SHARED_SUM, LEAST_SHARED_UPDATE) + 3 * GRAIN + 17
    arrays, slots = make_arrays(FULL, size), slots_of(FULL)
    layerwise = Recipe(LAMB)
    results = []
    for threads in (1, 2, 3, 64):
        engine = CpuEngine(threads, use_numba=True)
        state, out = engine.allocate(slots, size), np.empty(size - 9, np.float32)
        fill(state, arrays)
        chunk = state.receive().put(0, arrays["gradient"])
        state.accumulate(5, chunk, 9, size, 0.3)
        totals = [state.sum_of_squares(chunk, 1, size, 0.7).wait(), state.sum_of_squares(chunk, 1, size, 0.7, 1).wait()]
        sums = state.update(pass_of(FULL), 5, chunk, 9, size, out).wait()
        assert sums == pytest.approx(results[0][2] if results else sums, rel=1e-5)
        single = engine.allocate(slots_of(layerwise), size)
        single.write(PARAM, 0, arrays[PARAM])
        totals += single.measure(pass_of(layerwise), 0, chunk, 0, size).wait()
        results.append(({**contents(state, slots, size), "out": out}, totals, sums))
        engine.close()
        engine.close()
    for other, totals, _ in results[1:]:
        assert totals == results[0][1]
        for name, array in other.items():
            assert_same_bits(array, results[0][0][name], name)


def test_sessions_may_step_at_the_same_time(make_arrays, pass_of, fill, contents, assert_same_bits) -> None:
    pytest.importorskip("numba")
    size, engine = LEAST_SHARED_UPDATE + 1, CpuEngine(threads=3, use_numba=True)
    arrays = make_arrays(RECIPE, size)
    states = [engine.allocate(SLOTS, size) for _ in range(5)]
    barrier = threading.Barrier(len(states))

    def work(state) -> None:
        fill(state, arrays)
        chunk = state.receive().put(0, arrays["gradient"])
        barrier.wait()
        for _ in range(5):
            state.update(pass_of(RECIPE), 0, chunk, 0, size, None).wait()

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = contents(states[0], SLOTS, size)
    for state in states[1:]:
        for slot, array in contents(state, SLOTS, size).items():
            assert_same_bits(array, first[slot], slot)
    engine.close()


def test_two_threads_may_ask_for_the_same_kernel(tmp_path) -> None:
    numba_kernels = pytest.importorskip("stepwire_server.engines.cpu.numba_kernels", exc_type=ImportError)
    kernels, found = numba_kernels.NumbaKernels(tmp_path), []
    barrier = threading.Barrier(2)

    def ask() -> None:
        barrier.wait()
        found.append(kernels.sum_of_squares(FLOAT32, False))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


def test_an_update_adds_what_was_accumulated_and_clears_it(engine, pass_of, slots_of) -> None:
    recipe = Recipe(ALL_RULES[0], accumulates=True, averages=True, measures=True, precision=Precision.BFLOAT16)
    state = engine.allocate(slots_of(recipe), 4)
    chunk = state.receive().put(0, np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    state.accumulate(0, chunk, 0, 4, 0.5)
    state.accumulate(0, chunk, 0, 4, 0.5)
    assert state.sum_of_squares(chunk, 0, 4, 1.0, 0).wait() == 4 * 30.0
    assert state.fetch(chunk, 1, 3, 1.0, 1).tolist() == [4.0, 6.0]
    state.update(pass_of(recipe, factor=1.0, clip=1.0, rate1=0.5), 1, chunk, 1, 3, None).wait()
    out = np.empty(4, np.float32)
    state.read(ACCUMULATED, 0, out).wait()
    assert out.tolist() == [1.0, 0.0, 0.0, 4.0]
    state.read("exp_avg", 0, out).wait()
    assert out.tolist() == [0.0, 2.0, 3.0, 0.0]
    state.read(AVERAGE, 0, out).wait()
    assert out[0] == out[3] == 0.0 and out[1] != 0.0
    state.clear(ACCUMULATED)
    assert not state.fetch(chunk, 0, 4, 0.0, 0).any()


def test_steps_leave_no_memory_behind(engine, make_arrays, pass_of) -> None:
    arrays = make_arrays(RECIPE, 5000)
    state, out = engine.allocate(SLOTS, 5000), np.empty(5000, np.float32)
    step = pass_of(RECIPE)

    def steps(count: int) -> None:
        for _ in range(count):
            chunk = state.receive().put(0, arrays["gradient"])
            state.sum_of_squares(chunk, 0, 5000, 1.0).wait()
            state.update(step, 0, chunk, 0, 5000, out).wait()

    def grown() -> int:
        gc.collect()  # which also empties the interpreter's lists of free tuples
        before, _ = tracemalloc.get_traced_memory()
        steps(50)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        steps(3)
        # A leak grows in every round; threads that other tests left behind allocate in some.
        assert min(grown() for _ in range(5)) < 1000
    finally:
        tracemalloc.stop()


def test_prepared_kernels_are_not_compiled_again(monkeypatch, pass_of) -> None:
    numba_kernels = pytest.importorskip("stepwire_server.engines.cpu.numba_kernels", exc_type=ImportError)
    engine = CpuEngine(threads=1, use_numba=True)
    engine.prepare(RECIPE, FLOAT32, FLOAT32)
    engine.prepare(RECIPE, FLOAT32, None)

    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("compiled within a step")

    monkeypatch.setattr(numba_kernels, "_load", compiled)
    state = engine.allocate(SLOTS, 8)
    for payload in (np.ones(8, np.float32), np.frombuffer(b"." + bytes(32), np.uint8)[1:].view(np.float32)):
        chunk = state.receive().put(0, payload)
        assert state.sum_of_squares(chunk, 0, 8, 1.0).wait() == float(np.sum(payload))
        for out in (None, np.empty(8, np.float32), np.empty(33, np.uint8)[1:].view(np.float32)):
            state.update(pass_of(RECIPE), 0, chunk, 0, 8, out).wait()


def test_infinite_parameters_survive(engine, pass_of) -> None:
    state = engine.allocate(SLOTS, 3)
    state.write(PARAM, 0, np.array([np.inf, -np.inf, 1.0], np.float32))
    out = np.empty(3, np.float32)
    state.update(pass_of(RECIPE), 0, state.receive().put(0, np.ones(3, np.float32)), 0, 3, out).wait()
    assert out[:2].tolist() == [np.inf, -np.inf]


def test_numpy_stands_in_where_numba_is_missing(monkeypatch, pass_of) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine = CpuEngine()
    assert type(engine._kernels).__name__ == "NumpyKernels"
    state, out = engine.allocate(SLOTS, 2), np.empty(2, np.float32)
    numbers = {"factor": 1.0, "clip": 1.0, "rate1": 0.1, "rate2": 0.01, "step_size": 0.02, "eps": 0.0}
    state.update(pass_of(RECIPE, **numbers), 0, state.receive().put(0, np.ones(2, np.float32)), 0, 2, out).wait()
    assert out == pytest.approx(-0.02, rel=1e-4)


def test_importing_engines_loads_neither_cupy_nor_grpc_nor_numba() -> None:
    script = (
        "import sys, stepwire_server.engines, stepwire_server.rules;"
        "stepwire_server.engines.CpuEngine(use_numba=False);"
        "print(sorted({'cupy', 'grpc', 'numba', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("slot", [PARAM, "exp_avg"])
def test_a_slot_that_was_moved_stays_where_it_is(engine, pass_of, slot) -> None:
    state, staged = engine.allocate(SLOTS, 1000), engine.allocate(SLOTS, 1000)
    values, memory = np.arange(1000, dtype=np.float32), np.full(1000, 7.0, np.float32)
    state.write(slot, 0, values)
    assert state.move(slot, memory)
    assert state.nbytes == 3 * 4000
    np.testing.assert_array_equal(memory, values)
    state.write(slot, 10, values[:5])
    np.testing.assert_array_equal(memory[10:15], values[:5])
    staged.write(slot, 0, values[::-1])
    state.adopt(staged)
    np.testing.assert_array_equal(memory, values[::-1])
    chunk = state.receive().put(0, np.full(1000, 3.0, np.float32))
    state.update(pass_of(RECIPE), 0, chunk, 0, 1000, None)
    assert (memory != values[::-1]).all()
    state.close()
    assert memory.any()


def test_a_processor_pins_nothing(engine) -> None:
    memory = np.zeros(8, np.uint8)
    with engine.pin(memory):
        memory[:] = 1
    assert memory.sum() == 8
