"""A session is the same on every device: each program of steps, pulls, loads and moves gives the same bits on all."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import StepwireError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling
from stepwire_server.engines import PARAM, CpuEngine, Engine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_result import StepResult
from stepwire_server.rules import ALL_RULES, EIGHT_BIT_SLOTS, Decay, Precision
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config, recipes_of
from tests.server.pretended_gpus import (
    PretendedGpu,
    compiled_kernels,
    kernels_of,
    library_of,
    machine_code,
    needs_compiler,
    pretended_cupy,
)
from tests.server.session_driver import apply_step, everything, load, make_session
from tests.support.cuda_cases import assert_same_bits

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.many]

OPTIMIZERS: list[Optimizer] = [
    Adam(),
    AdamW(amsgrad=True),
    AdamW(formula="keras", maximize=True),
    Adam(formula="optax", nesterov=True, eps_root=1e-8),
    AdamW(formula="optax", amsgrad="corrected"),
    Adam(formula="no_bias_correction"),
    Adam(formula="decay_after", decoupled_weight_decay=True),
    NAdam(),
    RAdam(decoupled_weight_decay=True),
    Adamax(),
    SGD(),
    SGD(momentum=0.9, dampening=0.1),
    SGD(momentum=0.9, nesterov=True),
    RMSprop(),
    RMSprop(momentum=0.9, centered=True),
    Adagrad(initial_accumulator_value=0.1, lr_decay=0.01),
    Adadelta(),
    Lion(),
    LAMB(eps_root=1e-8),
    LARS(),
    LARS(nesterov=True),
]
TENSORS = (
    TensorSpec("blocks", (4500,)),
    TensorSpec("small", (37,)),
    TensorSpec("frozen", (300,), frozen=True),
    TensorSpec("empty", (0,)),
    TensorSpec("others", (50, 86), 1),
    TensorSpec("scalar", (), 1),
)
IDLE: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "betas": (0.0, 0.99), "alpha": 0.0}
"""Numbers of 0 have a recipe of their own: those of the second group."""
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
PAIRS = list(itertools.product(DTYPES, DTYPES))
ORDERS: list[Any] = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(6))]
OPERATIONS = ["step"] * 8 + ["step and again"] * 2 + ["load", "move", "poisoned step"]
LENGTH = 7
NUMBA = importlib.util.find_spec("numba") is not None


class Program(NamedTuple):
    """The options that a session is created with, the dtypes its steps use, and how its GPU behaves."""

    seed: int
    config: SessionConfig
    pairs: tuple[tuple[np.dtype[Any], np.dtype[Any]], ...]
    order: Any

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.config.rule.name}-{self.config.precision.value}-{self.order}"


def make_program(seed: int) -> Program:
    """Choose by the number what is to be met by all, and the rest by chance."""
    random = np.random.default_rng(seed)
    optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)]
    needs_momentum = optimizer.rule == "sgd" and optimizer.structure().nesterov
    idle = {name: value for name, value in IDLE.items() if hasattr(optimizer, name) and not needs_momentum}
    decays = [optimizer, dataclasses.replace(optimizer, weight_decay=0.1, **idle)]
    scaling = LossScaling(initial_scale=8.0, growth_interval=2) if seed % 4 == 0 else None
    treatment = GradientTreatment(
        non_finite=None if scaling else ("reject", "skip", "allow")[seed % 3],
        clip_grad_norm=float(random.choice([1.0, 100.0])) if seed % 2 else None,
        clip_formula=("torch", "optax", "keras")[seed % 3] if seed % 2 else None,
        clip_grad_value=0.05 if seed % 5 == 0 else None,
        accumulation_steps=2 if seed // 3 % 3 == 0 else 1,
        loss_scaling=scaling,
        missing_gradient="keep",
        parameter_average_decay=0.9 if seed % 4 == 1 else None,
    )
    pairs = tuple(PAIRS[(2 * seed + offset) % 9] for offset in (0, 4))
    fields: dict[str, Any] = {
        "optimizer": optimizer,
        "groups": tuple(each.hyperparameters() for each in decays),
        "group_clips": (None, 0.5) if seed % 6 == 1 else (None, None),
        "treatment": treatment,
        "measures": seed % 5 != 3,
        "gradient_dtype": pairs[0][0],
        "reply_dtype": pairs[0][1],
        "start_at_zero": False,
    }
    precision = list(Precision)[(seed + seed // len(OPTIMIZERS)) % 3]
    config = make_config(*TENSORS, precision=precision, **fields)
    if precision is Precision.INT8 and not set(config.rule.slots) <= EIGHT_BIT_SLOTS.keys():
        config = make_config(*TENSORS, precision=Precision.BFLOAT16, **fields)
    if seed % 2:
        config = mixed(config)
    return Program(seed, config, pairs, ORDERS[seed % len(ORDERS)])


def mixed(config: SessionConfig) -> SessionConfig:
    """Hold the moments of the second group in another precision than those of the first."""
    other = Precision.FLOAT32 if config.precision is not Precision.FLOAT32 else Precision.BFLOAT16
    specs = [
        dataclasses.replace(tensor.spec, state_precision=other.value) if tensor.spec.group else tensor.spec
        for tensor in config.layout.tensors
    ]
    return dataclasses.replace(config, layout=place(specs, 2), group_precisions=(config.precision, other))


PROGRAMS = [make_program(seed) for seed in range(len(OPTIMIZERS))]


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return compiled_kernels(request, tmp_path_factory)


@pytest.fixture(scope="module")
def library(directory: pathlib.Path) -> Any:
    return library_of(
        [
            kernel
            for program in PROGRAMS
            for recipe, (gradient, reply) in itertools.product(recipes_of(program.config), program.pairs)
            for precision in frozenset().union(*program.config.held_precisions)
            for kernel in kernels_of(recipe.held(precision), gradient, reply)
        ],
        directory,
    )


@pytest.fixture(scope="module", autouse=True)
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    yield from machine_code(tmp_path_factory)


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Engine]:
    """The rules' own functions, on NumPy."""
    engine = CpuEngine(use_numba=False)
    yield engine
    engine.close()


class Sessions:
    """The same session on several devices; what is asked of all is compared."""

    def __init__(self, config: SessionConfig, engines: list[Engine]) -> None:
        self.config = config
        self._engines = engines
        self.sessions = [make_session(config, engine) for engine in engines]

    def step(self, gradient: np.ndarray, chunks: list[tuple[int, int]], **fields: Any) -> StepResult | None:
        """Apply a step everywhere; returns the result, or None where it was refused."""
        outcomes = [self._outcome(session, gradient, chunks, fields) for session in self.sessions]
        (result, reply), *others = outcomes
        for other, values in others:
            if result is None:
                assert (other, values) == (result, reply), "refused alike"
                continue
            assert exact(other, self.config) == exact(result, self.config)
            assert measured(other, self.config) == pytest.approx(measured(result, self.config), rel=1e-5, nan_ok=True)
            assert_same_bits(values, reply, "reply")
        return result

    def load(self, slots: dict[str, np.ndarray]) -> None:
        for session in self.sessions:
            load(session, slots)

    def move(self) -> None:
        """Go on in new sessions, each with what a session on another device held."""
        pulled = [everything(session) for session in self.sessions]
        self.close()
        self.sessions = [make_session(self.config, engine) for engine in self._engines]
        for session, (snapshot, slots) in zip(self.sessions, [*pulled[1:], pulled[0]], strict=True):
            load(session, slots, snapshot)

    def check(self) -> None:
        """Compare everything that can be pulled, and the step that a checkpoint is checked by."""
        (snapshot, slots), *others = [everything(session) for session in self.sessions]
        for other, arrays in others:
            assert other == snapshot
            for slot in slots:
                assert_same_bits(arrays[slot], slots[slot], slot)
        first, *rest = [repr(session.exchange.shadow()) for session in self.sessions]
        assert [first] * len(rest) == rest

    def close(self) -> None:
        for session in self.sessions:
            session.close()

    @staticmethod
    def _outcome(
        session: Session, gradient: np.ndarray, chunks: list[tuple[int, int]], fields: dict[str, Any]
    ) -> tuple[StepResult | None, Any]:
        try:
            return apply_step(session, gradient, chunks, **fields)
        except StepwireError as problem:
            return None, (type(problem), str(problem), problem.metadata)


def exact(result: StepResult, config: SessionConfig) -> str:
    """Return what must be equal in every bit; NaN is printed like any NaN."""
    rough: dict[str, Any] = {"update_norm": None, "param_norm": None}
    if config.treatment.clip_grad_value is not None:
        rough["clipped_grad_norm"] = 0.0
    groups = tuple(group._replace(**rough) for group in result.groups)
    return repr(result._replace(groups=groups, **rough, times=None))


def measured(result: StepResult, config: SessionConfig) -> list[float]:
    """Return the sums that decide nothing, and are about equal."""
    found = [(each.update_norm, each.param_norm, each.clipped_grad_norm) for each in (result, *result.groups)]
    assert all(
        (norm is not None) == (config.measures and not (result.skipped or result.accumulated)) for norm, *_ in found
    )
    return [0.0 if norm is None else norm for norm in itertools.chain(*found)]


class Hand:
    """Draws what a client sends."""

    def __init__(self, program: Program) -> None:
        self._random = np.random.default_rng([program.seed, 1])
        self._program = program
        self._config = program.config

    def operation(self) -> str:
        return str(self._random.choice(OPERATIONS))

    def values(self, scale: float = 1.0) -> np.ndarray:
        """Draw a number for each element, and zeros for the padding."""
        values = np.zeros(self._config.layout.size, np.float32)
        for tensor in self._config.layout.tensors:
            values[tensor.offset : tensor.end] = scale * self._random.standard_normal(tensor.count)
        return values

    def gradient(self, poisoned: bool = False) -> np.ndarray:
        values = self.values(10.0 ** self._random.uniform(-3, 1))
        if poisoned:
            values[self._random.integers(4500, size=3)] = [np.inf, np.nan, -np.inf]
        return values

    def slots(self) -> dict[str, np.ndarray]:
        """Draw the slots of a load: the parameters alone, or everything but scales."""
        chosen = [PARAM] if self._random.random() < 0.5 else list(self._config.slots)
        return {slot: self.values() if slot == PARAM else np.abs(self.values(0.1)) for slot in chosen}

    def request(self) -> dict[str, Any]:
        """Draw what a step asks for, besides its number."""
        config, random = self._config, self._random
        gradient_dtype, reply_dtype = self._program.pairs[random.integers(2)]
        groups = tuple(dataclasses.replace(hyper, lr=hyper.lr * random.uniform(0.5, 2.0)) for hyper in config.groups)
        return {
            "gradient_dtype": gradient_dtype,
            "reply_dtype": reply_dtype,
            "reply": bool(random.random() < 0.8),
            "reply_elements": int(random.choice([256, 1024, 3840, 1 << 20])),
            "groups": groups
            if random.random() < 0.5
            else config.groups[::-1]
            if random.random() < 0.3
            else config.groups,
            "missing": frozenset(np.flatnonzero(random.random(len(TENSORS)) < random.choice([0.0, 0.0, 0.4])).tolist()),
        }

    def chunks(self, missing: frozenset[int]) -> list[tuple[int, int]]:
        """Cut the space, and mix the ranges; some of the missing tensors may not come at all."""
        layout, random = self._config.layout, self._random
        unit = layout.chunk_alignment
        edges = {0, layout.size, *(random.integers(layout.size // unit, size=random.integers(8)) * unit).tolist()}
        left_out = [layout.tensors[index] for index in missing if random.random() < 0.5]
        edges |= {edge for tensor in left_out for edge in (tensor.offset, tensor.end) if edge % unit == 0}
        ranges = list(itertools.pairwise(sorted(edges)))
        inside = [each for each in ranges for t in left_out if t.offset <= each[0] and each[1] <= t.end]
        ranges = [each for each in ranges if each not in inside]
        random.shuffle(ranges)
        return [(int(low), int(high)) for low, high in ranges]


def run(program: Program, engines: list[Engine]) -> None:
    """Run a program everywhere, and compare after each operation."""
    hand, sessions = Hand(program), Sessions(program.config, engines)
    sessions.load({PARAM: hand.values()})
    for _ in range(LENGTH):
        match hand.operation():
            case "load":
                sessions.load(hand.slots())
            case "move":
                sessions.move()
            case name:
                request = hand.request()
                gradient, chunks = hand.gradient(poisoned=name == "poisoned step"), hand.chunks(request["missing"])
                result = sessions.step(gradient, chunks, **request)
                if result is not None and name == "step and again":
                    replay = sessions.step(gradient, [], **request | {"step": result.step, "reply": True})
                    assert replay == result.replay()
        sessions.check()
    sessions.close()


# --- the programs ---------------------------------------------------------------------------------------------


def test_the_programs_use_every_optimizer_and_option() -> None:
    configs = [program.config for program in PROGRAMS]
    assert {config.optimizer.rule for config in configs} == {optimizer.rule for optimizer in OPTIMIZERS}
    assert {config.rule.update.__module__ for config in configs} == {rule.update.__module__ for rule in ALL_RULES}
    assert {config.precision for config in configs} == set(Precision)
    for precision in Precision:
        chosen = [recipes_of(config)[0] for config in configs if config.precision is precision]
        for flag in ("accumulates", "limits", "averages", "measures"):
            assert {getattr(recipe, flag) for recipe in chosen} == {False, True}, (precision, flag)
    used = [recipe for config in configs for recipe in recipes_of(config)]
    assert {slot for recipe in used for slot in recipe.forgotten} >= {"exp_avg", "square_avg", "grad_avg"}
    assert {recipe.decay for recipe in used} == set(Decay)
    assert any(len({recipe.rule.slots for recipe in recipes_of(config)}) > 1 for config in configs), "without momentum"
    assert {config.treatment.policy for config in configs} == {"reject", "skip", "allow"}
    assert {config.treatment.clip_formula for config in configs} == {None, "torch", "optax", "keras"}
    assert any(any(config.group_clips) for config in configs)
    assert {pair for program in PROGRAMS for pair in program.pairs} == set(PAIRS)
    assert {program.order for program in PROGRAMS} == set(ORDERS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_gpu_is_the_cpu_bit_for_bit(program: Program, on_cpu: Engine, library: Any, directory: pathlib.Path) -> None:
    cupy = pretended_cupy(directory, library=library, order=program.order)
    buffer_bytes, cache_bytes = (2048, 6144)[program.seed % 2], (1, 30_000, 60_000)[program.seed % 3]
    gpu = PretendedGpu(cupy, buffer_bytes=buffer_bytes, gradient_cache_bytes=cache_bytes)
    before = cupy.used_bytes
    run(program, [on_cpu, gpu])
    gpu.rest()
    assert cupy.used_bytes == before
    cupy.check()


@pytest.mark.long
@pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
@pytest.mark.parametrize("precision", Precision if os.environ.get("CI") == "true" else [Precision.INT8])
def test_all_three_engines_agree(
    precision: Precision, on_cpu: Engine, library: Any, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_parity` has every kernel of Numba; this has sessions that move in a ring, in CI of every precision."""
    program = next(each for each in PROGRAMS if each.config.precision is precision)
    directory.chmod(0o700)
    monkeypatch.setenv("STEPWIRE_CACHE_DIR", str(directory))
    numba = CpuEngine(threads=2, use_numba=True)
    cupy = pretended_cupy(directory, library=library, order=("random", 11))
    run(program._replace(pairs=program.pairs[:1] * 2), [on_cpu, PretendedGpu(cupy), numba])
    cupy.check()
    numba.close()
