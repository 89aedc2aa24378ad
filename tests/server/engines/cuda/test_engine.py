"""A pretended GPU with its engine: what it allocates, compiles and gives back, and what its errors leave behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import pathlib
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.errors import DataLossError, ResourceExhaustedError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import LAMB, LARS, SGD, Adam, AdamW
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import PARAM, CpuEngine, CudaEngine, DeviceInfo
from stepwire_server.engines.cuda.compiler import Compiler
from stepwire_server.engines.cuda.engine import CudaOptions
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import ACCUMULATED, ALL_RULES, Precision, Recipe
from tests.server.configs import make_config
from tests.server.pretended_gpus import (
    PretendedGpu,
    kernels_of_config,
    library_of,
    machine_code,
    needs_compiler,
)
from tests.server.session_driver import (
    RecordingWriter,
    apply_step,
    begin,
    everything,
    holder_of,
    load,
    make_session,
    request_of,
    stage,
)
from tests.support import cuda_cases as cases
from tests.support.fake_cupy.classes import CUDARuntimeError

pytestmark = [needs_compiler, pytest.mark.many]

RECIPE, HALVED = Recipe(ALL_RULES[0]), Recipe(ALL_RULES[0], precision=Precision.BFLOAT16)
SLOTS = cases.slots_of(RECIPE)
FLOAT32, BFLOAT16 = cases.WIRE["float32"], cases.WIRE["bfloat16"]
OUT_OF_MEMORY = CUDARuntimeError(2)
SHAPES = (TensorSpec("a", (3000,)), TensorSpec("b", (40,)), TensorSpec("c", (4200,), 1))
GROUPS = (Adam().hyperparameters(), Adam(weight_decay=0.1).hyperparameters())


def plan_of(**fields: Any) -> SessionConfig:
    optimizer = fields.setdefault("optimizer", Adam())
    decays = [optimizer, dataclasses.replace(optimizer, weight_decay=0.1)]
    return make_config(*SHAPES, groups=tuple(each.hyperparameters() for each in decays), **fields)


def in_precisions(*kinds: str) -> SessionConfig:
    """Return the plain plan with a precision for each tensor."""
    specs = [dataclasses.replace(spec, state_precision=kind) for spec, kind in zip(SHAPES, kinds, strict=True)]
    return dataclasses.replace(plan_of(), layout=place(specs, len(GROUPS)))


PLANS = {
    "plain": plan_of(),
    "three precisions": in_precisions("bfloat16", "float32", "int8"),
    "without telemetry": plan_of(measures=False),
    "accumulation": plan_of(treatment=GradientTreatment(accumulation_steps=2)),
    "clipping by norm": plan_of(treatment=GradientTreatment(clip_grad_norm=0.1)),
    "clipping by value": plan_of(treatment=GradientTreatment(clip_grad_value=0.1)),
    "average": plan_of(treatment=GradientTreatment(parameter_average_decay=0.9)),
    "loss scaling": plan_of(treatment=GradientTreatment(loss_scaling=LossScaling(initial_scale=4.0))),
    "layerwise": plan_of(optimizer=LAMB()),
    "layerwise in 8 bits": plan_of(optimizer=LARS(momentum=0.9), precision=Precision.INT8),
    "bfloat16": plan_of(precision=Precision.BFLOAT16, gradient_dtype=BFLOAT16, reply_dtype=BFLOAT16),
    "8 bits": plan_of(precision=Precision.INT8, reply_dtype=BFLOAT16),
    "8 bits of nothing": plan_of(optimizer=SGD(), precision=Precision.INT8),
    "everything": plan_of(
        optimizer=AdamW(amsgrad=True),
        treatment=GradientTreatment(
            accumulation_steps=2, clip_grad_norm=1.0, clip_grad_value=0.1, parameter_average_decay=0.9
        ),
    ),
}


@pytest.fixture(scope="module")
def library(directory: pathlib.Path) -> Any:
    """Every kernel of the plans above."""
    return library_of([kernel for config in PLANS.values() for kernel in kernels_of_config(config)], directory)


@pytest.fixture(scope="module", autouse=True)
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    yield from machine_code(tmp_path_factory)


@pytest.fixture
def nothing_compiled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep machine code apart from that of other tests."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))


@pytest.fixture
def reference() -> Iterator[CpuEngine]:
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


def gradient_of(config: SessionConfig, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(config.layout.size).astype(np.float32)
    for tensor, following in itertools.pairwise([*config.layout.tensors, None]):
        values[tensor.end : following.offset if following else None] = 0.0
    return values


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Compare what was pulled from two sessions."""
    return one[0] == other[0] and all(one[1][slot].tobytes() == other[1][slot].tobytes() for slot in other[1])


# --- the device -----------------------------------------------------------------------------------------------


def test_device_is_described(fake) -> None:
    engine = CudaEngine(1, fake())
    assert engine.device[:3] == DeviceInfo("cuda:1", "Pretended GPU", 1 << 30)[:3]


@pytest.mark.parametrize("options", [{}, {"buffers": 5, "buffer_bytes": 4096, "gradient_cache_bytes": 12_345}])
def test_working_bytes_are_what_the_engine_takes_at_most(fake, options) -> None:
    cupy, chosen = fake(), CudaOptions(**options)
    engine = CudaEngine(0, cupy, chosen)
    assert engine.bus.device_bytes == 2 * chosen.buffers * chosen.buffer_bytes <= cupy.used_bytes
    assert cupy.used_bytes <= engine.device.working_bytes
    assert engine._resources.gradients.most_bytes == (chosen.gradient_cache_bytes or (1 << 30) // 16)


@pytest.mark.parametrize("order", ["lazy", "greedy", ("random", 0)], ids=str)
def test_a_device_that_computes_is_found_to(fake, library, order) -> None:
    cupy = fake(order, library=library)
    engine = PretendedGpu(cupy, gradient_cache_bytes=1)
    before = cupy.used_bytes
    engine.self_test()
    assert cupy.used_bytes == before


def test_a_device_that_cannot_compile_is_found_to_be_broken(fake, nothing_compiled) -> None:
    engine = PretendedGpu(fake(broken_compiler=True))
    with pytest.raises(RuntimeError, match="libnvrtc"):
        engine.self_test()


def test_any_thread_may_call(fake, library) -> None:
    """The current device is a matter of the thread; the stand-in refuses calls where none is set."""
    config, failures = PLANS["everything"], []
    engine = PretendedGpu(fake(library=library), index=1)

    def work() -> None:
        try:
            session = make_session(config, engine)
            apply_step(session, gradient_of(config, 1))
            apply_step(session, gradient_of(config, 2))
            assert not everything(session)[1][ACCUMULATED].any()
            session.close()
            engine.rest()
            engine.close()
        except BaseException as problem:
            failures.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 63, 64, 65, 255, 256, 257, 5000])
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("mixed", [False, True])
def test_state_bytes_are_what_the_device_gives(fake, library, precision, size, mixed) -> None:
    cupy, recipe = fake("greedy", library=library), Recipe(ALL_RULES[0], accumulates=True, precision=precision)
    engine, regions = PretendedGpu(cupy), cases.regions_of(size, [(0, 1, precision)]) if mixed else None
    slots = cases.slots_of(recipe, regions)
    before, count = cupy.used_bytes, cupy.allocations
    state = engine.allocate(slots, size)
    assert state.nbytes == engine.state_bytes(slots, size) == cupy.used_bytes - before
    assert cupy.allocations == count + 1
    assert not any(array.any() for array in cases.everything_of(state, recipe, size).values())
    state.close()
    assert cupy.used_bytes == before


def test_arrays_begin_at_multiples_of_256_bytes(fake) -> None:
    state = PretendedGpu(fake()).allocate(cases.slots_of(HALVED), 100)
    assert state.nbytes == 512 + 256 + 256
    assert [slot.values.data.ptr % 256 for slot in state._slots.values()] == [0, 0, 0]
    state.close()


def test_out_of_memory_says_how_much_was_wanted_and_where(fake) -> None:
    cupy = fake(memory_bytes=2 << 20)
    engine = PretendedGpu(cupy, index=1)
    before = cupy.used_bytes
    free = (2 << 20) - before
    with pytest.raises(
        ResourceExhaustedError, match=rf"no memory on cuda:1 \(Pretended GPU\) for 12000768 bytes; {free} are free"
    ) as caught:
        engine.allocate(SLOTS, 1_000_021)
    assert caught.value.metadata == {"needed_bytes": "12000768", "device": "cuda:1"}
    assert cupy.used_bytes == before
    state = engine.allocate(SLOTS, 100)
    assert state.nbytes == 3 * 512
    state.close()


@pytest.mark.parametrize("operation", ["malloc", "PinnedMemory"])
def test_an_engine_that_cannot_be_started_leaves_nothing(fake, operation) -> None:
    counted = fake()
    PretendedGpu(counted)
    count = counted.allocations
    assert count == 7, "three buffers each way and the tables; sums are pinned, as many as the tables"
    for after in range(count):
        cupy = fake()
        for _ in range(2):  # it tries twice
            cupy.fail_next(operation, OUT_OF_MEMORY, after)
            after = 0
        with pytest.raises(ResourceExhaustedError if operation == "malloc" else RuntimeError) as caught:
            PretendedGpu(cupy)
        del caught
        gc.collect()
        OUT_OF_MEMORY.__traceback__ = None
        assert (cupy.used_bytes, cupy.pinned_bytes) == (0, 0)


def test_memory_for_gradients_is_kept_for_the_next_and_given_back_in_need(fake, library) -> None:
    config = PLANS["plain"]
    cupy = fake(library=library, memory_bytes=2 << 20)
    engine = PretendedGpu(cupy, gradient_cache_bytes=1 << 20)
    session = make_session(config, engine)
    before, gradient_bytes = cupy.used_bytes, 4 * config.layout.size
    apply_step(session, gradient_of(config, 1))
    count = cupy.allocations
    assert cupy.used_bytes == before + gradient_bytes
    apply_step(session, gradient_of(config, 2))
    assert (cupy.used_bytes, cupy.allocations) == (before + gradient_bytes, count), "the same memory again"
    engine.rest()
    assert cupy.used_bytes == before
    apply_step(session, gradient_of(config, 3))
    wanted = (2 << 20) - before - gradient_bytes + 1024
    large = engine.allocate({PARAM: Precision.FLOAT32}, wanted // 1024 * 256)
    assert cupy.used_bytes == before + large.nbytes
    large.close()
    apply_step(session, gradient_of(config, 4))
    session.close()


def test_statistics_count_state_and_memory_that_is_kept(fake, library) -> None:
    config, cupy = PLANS["plain"], fake(library=library)
    engine = PretendedGpu(cupy, gradient_cache_bytes=1 << 20)
    working_bytes = engine.device.working_bytes
    assert engine.statistics() == (0, 0, working_bytes, 1, 0, 0)
    session = make_session(config, engine)
    apply_step(session, gradient_of(config, 1))
    assert engine.statistics()[:4] == (session.memory_bytes, 4 * config.layout.size, working_bytes, 1)
    engine.rest()
    session.close()
    assert engine.statistics()[:4] == (0, 0, working_bytes, 1)


def test_what_a_context_takes_is_no_part_of_the_budget_and_code_has_its_room(
    fake, library, tmp_path, monkeypatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    cupy = fake(library=library, memory_bytes=64 << 20)
    cupy._driver.context_bytes = 5 << 20
    engine = PretendedGpu(cupy)
    assert (engine.device.memory_bytes, engine.statistics().taken_bytes) == (59 << 20, 5 << 20)
    assert engine.device.working_bytes - cupy.used_bytes == (59 << 20) // 64, "the room for code"
    for name in ("sum_float32", "sum_int8"):
        engine._resources.kernels.of_gradients(name)
    (file,) = tmp_path.glob("*.cubin")
    assert engine.statistics().code_bytes == file.stat().st_size
    again = PretendedGpu(cupy)
    again._resources.kernels.of_gradients("sum_float32")
    assert again.statistics().code_bytes == file.stat().st_size, "from the file too"


def test_memory_that_is_given_back_was_zeroed(fake, library) -> None:
    """The stand-in fills what is freed with garbage; so it is looked at on its way there."""
    config, cupy, seen = PLANS["plain"], fake(library=library), []
    engine = PretendedGpu(cupy)
    session, free = make_session(config, engine), cupy._driver.memories.free

    def watched(freed: Any) -> None:
        seen.append(bool(freed.bytes_at(freed.start, freed.size).any()))
        free(freed)

    cupy._driver.memories.free = watched
    apply_step(session, gradient_of(config, 1))
    session.close()
    engine.rest()
    del cupy._driver.memories.free
    assert seen == [False, False], "of the state, and of the gradient"


def test_a_session_that_finds_no_memory_leaves_the_one_beside_it_as_it_is(fake, library, reference) -> None:
    config = PLANS["plain"]
    cupy = fake(library=library, memory_bytes=2 << 20)
    engine = PretendedGpu(cupy, gradient_cache_bytes=1)
    budget = MemoryBudget(1 << 30)
    session, expected = make_session(config, engine, budget=budget), make_session(config, reference)
    before = cupy.used_bytes
    hog = engine.allocate({PARAM: Precision.FLOAT32}, ((2 << 20) - before) // 4 // 64 * 64)
    with pytest.raises(ResourceExhaustedError):
        make_session(config, engine)
    with pytest.raises(ResourceExhaustedError):
        apply_step(session, gradient_of(config, 1))
    with pytest.raises(ResourceExhaustedError):
        load(session, everything(session)[1])
    hog.close()
    assert cupy.used_bytes == before
    assert budget.reserved_bytes == session.memory_bytes
    for step in (1, 2):
        for each in (session, expected):
            apply_step(each, gradient_of(config, step))
    assert same(everything(session), everything(expected))
    session.close()


# --- kernels --------------------------------------------------------------------------------------------------


def test_prepare_compiles_each_module_once(fake, library, nothing_compiled) -> None:
    cupy = fake(library=library)
    engine = PretendedGpu(cupy)
    for _ in range(2):
        engine.prepare(RECIPE, FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 2, "one module to update, one for gradients"
    engine.prepare(Recipe(ALL_RULES[0], precision=Precision.INT8), FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 4, "one more, for tensors of both kinds, and one for blocks"


def test_the_least_recently_used_module_is_unloaded_where_there_are_too_many(
    fake, library, nothing_compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_module = Compiler.load
    monkeypatch.setattr(Compiler, "load", lambda *of: (loaded.append(of[1]), load_module(*of))[1])
    engine = PretendedGpu(fake(library=library))
    recipes = [Recipe(ALL_RULES[0], precision=each) for each in (Precision.INT8, Precision.FLOAT32, Precision.BFLOAT16)]
    int8, float32, _ = recipes
    for recipe in (int8, float32):
        engine.prepare(recipe, FLOAT32, FLOAT32)
    engine.bound_kernels(types.SimpleNamespace(most=2))
    before = engine.statistics().code_bytes
    engine.prepare(int8, FLOAT32, FLOAT32)  # now the one that was used last
    loaded.clear()
    for recipe in (*recipes, int8):
        engine.prepare(recipe, FLOAT32, FLOAT32)
    assert len(loaded) == 2, "bfloat16 in the place of int8, then int8 in that of float32"
    engine.prepare(float32, FLOAT32, FLOAT32)
    assert (len(loaded), engine.statistics().code_bytes) == (3, before)


def test_rules_of_one_formula_share_a_kernel_and_layerwise_ones_prepare_to_measure(
    fake, library, nothing_compiled
) -> None:
    cupy = fake(library=library)
    engine = PretendedGpu(cupy)
    alike = [rule for rule in ALL_RULES if rule.update is ALL_RULES[0].update]
    assert len(alike) > 1
    for rule in alike:
        engine.prepare(Recipe(rule), FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 2
    engine.prepare(PLANS["layerwise"].recipe(PLANS["layerwise"].groups[0]), FLOAT32, FLOAT32)
    assert len(cupy.compiled) == 4


def test_warming_up_compiles_what_most_sessions_need(fake, library, nothing_compiled) -> None:
    cupy = fake(library=library)
    engine = CudaEngine(0, cupy)
    engine.warm_up()
    count = len(cupy.compiled)
    for optimizer, dtype in itertools.product([Adam(), AdamW()], [FLOAT32, BFLOAT16]):
        config = make_config(*SHAPES[:1], optimizer=optimizer, gradient_dtype=dtype, reply_dtype=dtype)
        session = make_session(config, engine)
        apply_step(session, gradient_of(config, 1))
        session.close()
    assert len(cupy.compiled) == count > 0


@pytest.mark.parametrize("name", PLANS)
def test_no_step_pull_or_load_compiles(fake, library, nothing_compiled, name) -> None:
    config, cupy = PLANS[name], fake("greedy", library=library)
    engine = PretendedGpu(cupy)
    session = make_session(config, engine)
    count, size = len(cupy.compiled), config.layout.size
    kernels = dict(engine._resources.kernels._functions)
    for step in range(1, 5):
        cuts = [0, *range(1024, size, 1024 * step), size]
        result, _ = apply_step(session, gradient_of(config, step), list(itertools.pairwise(cuts)), reply_elements=1024)
        assert not result.skipped
    if config.treatment.loss_scaling:
        assert apply_step(session, np.full(size, np.inf, np.float32))[0].skipped
    load(session, everything(session)[1], everything(session)[0])
    apply_step(session, gradient_of(config, 9))
    assert len(cupy.compiled) == count
    assert engine._resources.kernels._functions == kernels
    session.close()


def test_a_step_with_other_dtypes_compiles_before_it_begins(fake, nothing_compiled, library) -> None:
    config, cupy = PLANS["bfloat16"], fake(library=library)
    engine = PretendedGpu(cupy)
    session = make_session(config, engine)
    before = len(cupy.compiled)
    step = begin(session, request_of(session, reply_dtype=FLOAT32))
    assert len(cupy.compiled) == before + 2, "with weight decay and without; nothing holds float32 moments here"
    step.close()
    session.close()


# --- broken devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "8 bits", "accumulation"])
@pytest.mark.parametrize("operation", ["kernel", "copy", "synchronize"])
@pytest.mark.parametrize("after", [0, 2, 9])
def test_an_error_in_a_commit_damages_the_session_and_no_other(
    fake, library, reference, name, operation, after
) -> None:
    """It is all of the step, none of it, or damaged; the session beside shares the slots and goes on."""
    config, cupy = PLANS[name], fake("greedy", library=library)
    engine = PretendedGpu(cupy)
    broken, beside, expected, whole = (make_session(config, each) for each in (engine, engine, reference, reference))
    size, failure = config.layout.size, RuntimeError("an illegal memory access was encountered")
    for each in (broken, beside, expected, whole):
        apply_step(each, gradient_of(config, 1))
    request = request_of(broken, reply_elements=1024)
    gradient = gradient_of(config, 2).astype(config.gradient_dtype)
    staged = stage(broken, request, gradient, [(0, 2048), (2048, 4096), (4096, size)])
    cupy.fail_next(operation, failure, after)
    try:
        broken.commit(staged, RecordingWriter(size, config.reply_dtype))
    except RuntimeError as problem:
        assert problem is failure
    cupy._driver.failures._planned[operation].clear()
    staged.close()
    try:
        if broken.exchange.snapshot().step == 2:
            apply_step(whole, gradient_of(config, 2))
        assert same(everything(broken), everything(whole))
    except DataLossError:
        with pytest.raises(DataLossError):
            apply_step(broken, gradient_of(config, 2), step=2)
    for step in (2, 3, 4):
        for each in (beside, expected):
            apply_step(each, gradient_of(config, step))
    assert same(everything(beside), everything(expected))
    broken.close()
    beside.close()


@pytest.mark.parametrize("operation", ["kernel", "copy"])
def test_the_first_kernel_of_an_update_that_fails_damages(fake, library, operation) -> None:
    config, cupy = PLANS["plain"], fake(library=library)
    session = make_session(config, PretendedGpu(cupy))
    step = stage(session, request_of(session), gradient_of(config, 1), [(0, config.layout.size)])
    cupy.fail_next(operation, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        session.commit(step, RecordingWriter(config.layout.size, FLOAT32))
    step.close()
    with pytest.raises(DataLossError, match="step 1"):
        session.exchange.snapshot()
    session.close()


@pytest.mark.parametrize("operation", ["copy", "kernel", "memset"])
def test_a_load_that_fails_half_way_damages_the_session_and_frees_its_memory(fake, library, operation) -> None:
    config, cupy = PLANS["8 bits"], fake("greedy", library=library)
    session = make_session(config, PretendedGpu(cupy))
    apply_step(session, gradient_of(config, 1))
    before, (snapshot, slots) = cupy.used_bytes, everything(session)
    request = LoadRequest(1, tuple(slots), step=snapshot.step, tensor_steps=snapshot.tensor_steps)
    with session.exchange.loading(request, holder_of(session)) as staged:
        for slot, values in slots.items():
            staged.add(slot, 0, len(values), values.view(np.uint8))
        staged.staged.arrays.settle()
        cupy.fail_next(operation, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            session.exchange.commit_load(staged)
    del staged
    with pytest.raises(DataLossError, match="load 1"):
        session.exchange.snapshot()
    gc.collect()  # the error's traceback
    assert cupy.used_bytes == before
    session.close()


# --- the end --------------------------------------------------------------------------------------------------


def test_an_engine_is_closed_twice_and_its_memory_goes_with_it(fake, library) -> None:
    config, cupy = PLANS["8 bits"], fake("greedy", library=library)
    engine = PretendedGpu(cupy)
    session = make_session(config, engine)
    apply_step(session, gradient_of(config, 1))
    for closed in (session, session, engine, engine):
        closed.close()
    gc.disable()
    try:
        del engine, session, closed
        assert cupy.used_bytes == 0, "without a search for cycles"
    finally:
        gc.enable()


def test_a_launch_without_memory_for_its_stack_is_repeated_once_memory_is_reclaimed(fake, library) -> None:
    cupy = fake(library=library)
    engine = PretendedGpu(cupy)
    config = PLANS["plain"]
    session = make_session(config, engine)
    apply_step(session, gradient_of(config, 1))
    assert engine.statistics().kept_gradient_bytes > 0
    cupy.fail_next("kernel", cupy.cuda.driver.CUDADriverError(2))
    apply_step(session, gradient_of(config, 2))
    session.close()


def test_an_engine_of_the_second_device_makes_no_context_on_the_first(fake, library) -> None:
    cupy = fake(library=library)
    engine = PretendedGpu(cupy, index=1)
    config = PLANS["everything"]
    session = make_session(config, engine)
    for seed in (1, 2):
        apply_step(session, gradient_of(config, seed))
    session.close()
    engine.close()
    assert (cupy.contexts, cupy.spinning_waits) == ({1}, 0)
    cupy.check()
