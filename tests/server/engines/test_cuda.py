"""The GPU engine on a stand-in for CuPy that runs the generated kernels on the processor."""

from __future__ import annotations

import importlib.util
import pathlib
import threading
import types

import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines import PARAM, CpuEngine, CudaEngine, Device
from stepwire_server.engines.cuda_source import gradient_kernels, measure_kernel, module_source, update_kernel
from stepwire_server.rules import ACCUMULATED, ALL_RULES, Precision, Recipe


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, shim = load("cuda_cases"), load("cuda_shim")
pytestmark = pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed; it compiles for the processor")

RECIPE = Recipe(ALL_RULES[0])
SLOTS = cases.slots_of(RECIPE)
HALVED = Recipe(ALL_RULES[0], precision=Precision.BFLOAT16)
FLOAT32 = np.dtype(np.float32)
BFLOAT16 = cases.WIRE["bfloat16"]


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory) -> pathlib.Path:
    """Keep compiled kernels between runs: compiling all of them takes a while."""
    cache = getattr(request.config, "cache", None)
    return pathlib.Path(cache.mkdir("stepwire-cuda-shim")) if cache else tmp_path_factory.mktemp("shim")


@pytest.fixture(scope="module")
def fake_cupy(directory):
    return lambda **options: shim.FakeCupy(directory, **options)


@pytest.fixture(scope="module")
def cuda_engine(directory):
    """Two libraries hold every kernel, one for each processor: g++ takes longer to start than to compile one."""
    kernels = [update_kernel(*case) for case in cases.CASES]
    kernels += [measure_kernel(recipe, gradient) for recipe, gradient, _ in cases.LAYERWISE] + gradient_kernels()
    sources = [module_source(kernels[k::2]) for k in range(2)]
    return CudaEngine(cupy=shim.FakeCupy(directory, library=shim.Library(sources, directory)))


@pytest.fixture(scope="module")
def numpy_engine():
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_updates_are_those_of_numpy_bit_for_bit(cuda_engine, numpy_engine, case) -> None:
    cases.check_update(cuda_engine, numpy_engine, case)


@pytest.mark.parametrize("case", cases.LAYERWISE, ids=lambda case: case.name)
def test_measures_are_those_of_numpy_bit_for_bit(cuda_engine, numpy_engine, case) -> None:
    cases.check_measures(cuda_engine, numpy_engine, case)


@pytest.mark.parametrize("gradient", cases.WIRE)
def test_sums_and_accumulation_are_those_of_numpy_bit_for_bit(cuda_engine, numpy_engine, gradient) -> None:
    cases.check_gradients(cuda_engine, numpy_engine, gradient)


def test_cases_leave_no_rule_decay_or_option_out() -> None:
    recipes = [case.recipe for case in cases.CASES]
    assert len({(recipe.rule.update, recipe.decay) for recipe in recipes}) == 4 * len(cases.RULES)
    assert {rule.update for rule in ALL_RULES} == {recipe.rule.update for recipe in recipes}
    assert len({recipe.key[2:] for recipe in recipes}) == 32
    assert len({case[1:] for case in cases.CASES}) == 12


@pytest.mark.parametrize("recipe", [RECIPE, HALVED], ids=["float32", "bfloat16"])
def test_state_outlives_many_steps(fake_cupy, numpy_engine, recipe) -> None:
    arrays, results = cases.make_arrays(recipe, 700, odd=False), []
    for engine in (CudaEngine(cupy=fake_cupy()), numpy_engine):
        state, out = cases.filled(engine, recipe, arrays), np.empty(350, np.float32)
        chunk = state.stage(arrays["gradient"])
        for t in range(1, 11):
            for start in (0, 350):
                step = cases.step_of(recipe, t)._replace(seed=t)
                state.update(step, start, chunk, start, start + 350, None if recipe is HALVED else out)
        results.append(cases.everything_of(state, recipe, 700))
    for name in results[1]:
        cases.assert_same_bits(results[0][name], results[1][name], name)


def test_a_measuring_kernel_that_strides_sums_everything(cuda_engine, numpy_engine, monkeypatch) -> None:
    monkeypatch.setattr("stepwire_server.engines.cuda_kernels._MOST_MEASURING_BLOCKS", 3)
    case = next(case for case in cases.CASES if case.recipe.sums and case.gradient == "bfloat16")
    size, sums = 5 * 3 * 256 + 101, []
    for engine in (cuda_engine, numpy_engine):
        state = engine.allocate(cases.slots_of(case.recipe), size)
        state.write(PARAM, 0, np.full(size, 0.5, np.float32))
        chunk = state.stage(np.full(size, 0.25, BFLOAT16))
        out = None if case.reply is None else np.empty(size, cases.WIRE[case.reply])
        sums.append(state.update(cases.step_of(case.recipe), 0, chunk, 0, size, out))
        state.close()
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize(("gradient", "reply"), [("float32", "float32"), ("bfloat16", "float16"), ("float16", None)])
def test_a_step_through_its_own_modules_is_that_of_the_cpu(fake_cupy, numpy_engine, gradient, reply) -> None:
    cases.check_update(CudaEngine(cupy=fake_cupy()), numpy_engine, cases.Case(RECIPE, gradient, reply))


def test_device_is_described(fake_cupy) -> None:
    assert CudaEngine(1, fake_cupy()).device == Device("cuda:1", "Pretended GPU", 1 << 30)


def test_allocated_arrays_are_zero_and_counted(fake_cupy) -> None:
    engine = CudaEngine(cupy=fake_cupy())
    for recipe, nbytes in [(RECIPE, 1200), (HALVED, 800)]:
        slots = cases.slots_of(recipe)
        state = engine.allocate(slots, 100)
        assert state.nbytes == engine.state_bytes(slots, 100) == nbytes
        assert not any(array.any() for array in cases.everything_of(state, recipe, 100).values())


def test_eight_bits_are_refused_before_anything_is_allocated(fake_cupy) -> None:
    cupy = fake_cupy()
    engine, slots = CudaEngine(cupy=cupy), {PARAM: Precision.FLOAT32, "exp_avg": Precision.INT8}
    recipe = Recipe(ALL_RULES[0], precision=Precision.INT8)
    for attempt in (
        lambda: engine.allocate(slots, 10),
        lambda: engine.state_bytes(slots, 10),
        lambda: engine.prepare(recipe, FLOAT32, None),
    ):
        with pytest.raises(UnsupportedFeatureError, match="int8 is not served on cuda:0 yet; use bfloat16") as caught:
            attempt()
        assert caught.value.metadata == {"field": "config.state_precision", "feature": "state_int8"}
    assert cupy.used_bytes == 0


@pytest.mark.parametrize("name", cases.WIRE)
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_read_and_write_convert(fake_cupy, name, precision) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(cases.WIRE[name])
    held = values.astype(np.float32).astype(cases.WIRE[precision.value])
    state = CudaEngine(cupy=fake_cupy()).allocate({"exp_avg": precision}, 1003)
    state.write("exp_avg", 2, cases.unaligned(values))
    whole, part = np.empty(1003, np.float32), np.empty(999 * values.itemsize + 1, np.uint8)[1:].view(values.dtype)
    state.read("exp_avg", 0, whole)
    cases.assert_same_bits(whole[2:-1], held.astype(np.float32))
    assert whole[[0, 1, -1]].tolist() == [0.0, 0.0, 0.0]
    state.read("exp_avg", 3, part)
    cases.assert_same_bits(part.copy(), held[1:].astype(values.dtype))


def test_out_of_memory_says_how_much_was_wanted_and_where(fake_cupy) -> None:
    cupy = fake_cupy(memory_bytes=10_000)
    engine = CudaEngine(1, cupy)
    with pytest.raises(
        ResourceExhaustedError, match=r"cuda:1 \(Pretended GPU\) for 3 arrays of 1000 elements \(12000 bytes\)"
    ) as caught:
        engine.allocate(SLOTS, 1000)
    assert caught.value.metadata == {"needed_bytes": "12000", "device": "cuda:1"}
    caught.value.__traceback__ = caught.value.__cause__ = None
    assert cupy.used_bytes == 0 and cupy.freed == 1
    assert engine.allocate(SLOTS, 100).nbytes == 1200


def test_ranges_outside_the_arrays_are_refused(fake_cupy) -> None:
    recipe = Recipe(ALL_RULES[0], accumulates=True)
    state, step = CudaEngine(cupy=fake_cupy()).allocate(cases.slots_of(recipe), 10), cases.step_of(recipe)
    chunk = state.stage(np.ones(6, np.float32))
    for attempt in (
        lambda: state.update(step, 0, chunk, 0, 7, None),
        lambda: state.update(step, 5, chunk, 0, 6, None),
        lambda: state.update(step, 0, chunk, 0, 6, np.empty(5, np.float32)),
        lambda: state.measure(step, 5, chunk, 0, 6),
        lambda: state.fetch_direction(step, 5, chunk, 0, 6),
        lambda: state.accumulate(5, chunk, 0, 6, 1.0),
        lambda: state.sum_of_squares(chunk, 0, 7, 1.0),
        lambda: state.sum_of_squares(chunk, 0, 6, 1.0, 5),
        lambda: state.fetch(chunk, 0, 6, 1.0, 5),
        lambda: state.read(PARAM, 9, np.empty(2, np.float32)),
        lambda: state.write(PARAM, -1, np.empty(2, np.float32)),
    ):
        with pytest.raises(IndexError):
            attempt()


def test_prepare_compiles_all_that_a_step_needs_and_each_module_once(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    engine.prepare(RECIPE, FLOAT32, FLOAT32)
    engine.prepare(RECIPE, FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 2, "one module to update, one for gradients"
    state = engine.allocate(SLOTS, 3)
    chunk = state.stage(np.ones(3, np.float32))
    state.update(cases.step_of(RECIPE), 0, chunk, 0, 3, np.empty(3, np.float32))
    assert state.sum_of_squares(chunk, 0, 3, 2.0) == 12.0
    assert len(cupy.compiled) == 2


def test_rules_of_one_formula_share_a_kernel_and_layerwise_ones_prepare_to_measure(fake_cupy) -> None:
    cupy = fake_cupy()
    engine, layerwise = CudaEngine(cupy=cupy), cases.LAYERWISE[0]
    alike = [rule for rule in ALL_RULES if rule.update is ALL_RULES[0].update]
    assert len(alike) > 1
    for rule in alike:
        engine.prepare(Recipe(rule), FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 2
    engine.prepare(layerwise.recipe, cases.WIRE[layerwise.gradient], cases.WIRE.get(layerwise.reply))
    assert len(cupy.compiled) == 4


def test_adopt_takes_the_slots_of_the_other_and_frees_its_own(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    state, other = engine.allocate(SLOTS, 4), engine.allocate({PARAM: Precision.FLOAT32}, 4)
    replaced = state._arrays[PARAM]
    state.write(PARAM, 0, np.full(4, 3.0, np.float32))
    other.write(PARAM, 0, np.full(4, 2.0, np.float32))
    state.adopt(other)
    out = np.empty(4, np.float32)
    state.read(PARAM, 0, out)
    assert out.tolist() == [2.0] * 4
    assert replaced.host.tolist() == [0.0] * 4
    del replaced
    assert (other.nbytes, state.nbytes, cupy.used_bytes) == (0, 48, 48)


def test_adopt_rounds_to_the_precision_of_the_slot(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    values = cases.make_arrays(RECIPE, 700, odd=True)["exp_avg"]
    state, other = engine.allocate(cases.slots_of(HALVED), 700), engine.allocate(SLOTS, 700)
    other.write("exp_avg", 0, values)
    state.adopt(other)
    with np.errstate(all="ignore"):
        want = values.astype(BFLOAT16)
    got = np.empty(700, BFLOAT16)
    state.read("exp_avg", 0, got)
    cases.assert_same_bits(got, want)
    assert (other.nbytes, state.nbytes, cupy.used_bytes) == (0, 5600, 5600)
    engine.allocate(cases.slots_of(HALVED), 0).adopt(engine.allocate(SLOTS, 0))


def test_closing_zeroes_memory_gives_it_back_and_twice_is_harmless(fake_cupy) -> None:
    cupy = fake_cupy()
    engine = CudaEngine(cupy=cupy)
    state = engine.allocate(SLOTS, 4)
    array = state._arrays["exp_avg"]
    state.write("exp_avg", 0, np.ones(4, np.float32))
    for closed in (state, state, engine, engine):
        closed.close()
    assert array.host.tolist() == [0.0] * 4
    del array
    assert (state.nbytes, cupy.used_bytes) == (0, 0)
    assert cupy.freed == 4


def test_an_empty_range_of_a_measuring_recipe_sums_to_zero(fake_cupy) -> None:
    recipe = Recipe(ALL_RULES[0], limits=True, measures=True)
    state = CudaEngine(cupy=fake_cupy()).allocate(cases.slots_of(recipe), 3)
    chunk = state.stage(np.ones(3, np.float32))
    assert state.update(cases.step_of(recipe), 3, chunk, 1, 1, None) == (0.0, 0.0, 0.0)


def test_any_thread_may_call(fake_cupy) -> None:
    """The current device is a matter of the thread; the stand-in refuses calls where none is set."""
    engine, failures, recipe = CudaEngine(cupy=fake_cupy()), [], Recipe(ALL_RULES[0], accumulates=True)
    state, step = engine.allocate(cases.slots_of(recipe), 3), cases.step_of(recipe)

    def work() -> None:
        try:
            chunk = state.stage(np.ones(3, np.float32))
            state.accumulate(0, chunk, 0, 3, 1.0)
            assert state.sum_of_squares(chunk, 0, 3, 1.0, 0) == 12.0
            state.update(step, 0, chunk, 0, 3, np.empty(3, np.float32))
            assert not state.fetch(chunk, 0, 3, 0.0, 0).any(), f"{ACCUMULATED} is cleared"
            state.close()
        except BaseException as problem:
            failures.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
