"""The operations on a session, as records, and their strategies: mostly right, often enough wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

LAST = 2**64 - 1
Vector = npt.NDArray[np.float64]
LAYOUTS: list[list[tuple[tuple[int, ...], int]]] = [
    [((3,), 0)],
    [((2, 2), 0), ((0, 5), 0), ((), 0)],
    [((5,), 0), ((4,), 1), ((3,), 1)],
    [((2,), 1), ((0,), 0)],
    [((0, 3), 0)],
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What the session is created with."""

    layout: int
    policy: int
    amsgrad: bool
    decoupled: bool
    weight_decay: float
    maximize: bool
    corrected: bool
    zeros: bool
    gradient_dtype: int
    reply_dtype: int


@dataclasses.dataclass(frozen=True)
class Begin:
    """The opening of a step.

    Attributes:
        delta: 1 is the next step, 0 the last again.
        load_delta: from the last load to the one that the step names; None names none.
        fault: an option that is wrong or not served.
    """

    delta: int = 1
    epoch: int = 0
    load_delta: int | None = None
    gradient_dtype: int = 0
    reply_dtype: int = 0
    reply_mode: int = 0
    lr: float | None = None
    maximize: bool | None = None
    loss_scale: float | None = None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Eighths, exact in every encoding, of which `bad` may replace one."""

    seed: int
    bad: float | None
    where: int

    def values(self, size: int) -> Vector:
        values = np.random.default_rng(self.seed).integers(-8, 9, size) / 8.0
        if self.bad is not None and size:
            values[self.where % size] = self.bad
        return values


@dataclasses.dataclass(frozen=True)
class Open:
    stream: int
    token: str
    epoch: int
    worker: int
    durable_step: int
    fault: str


@dataclasses.dataclass(frozen=True)
class WholeStep:
    """A step whose chunks cover the space, cut at `cuts` and sent in the order of `seed`; `slip` spoils one of them."""

    stream: int
    begin: Begin
    gradient: Gradient
    cuts: tuple[int, ...]
    seed: int
    in_one: bool
    slip: str


@dataclasses.dataclass(frozen=True)
class Overtaken:
    """A step whose chunks have been sent when another stream attaches with `token`; then comes its commit."""

    stream: int
    begin: Begin
    gradient: Gradient
    token: str


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message of any kind."""

    stream: int
    begin: Begin | None
    chunk: tuple[int, int] | None
    extra_bytes: int
    commit: bool
    faults: tuple[str, ...]
    gradient: Gradient


@dataclasses.dataclass(frozen=True)
class Close:
    stream: int


@dataclasses.dataclass(frozen=True)
class Unary:
    token: str
    begin: Begin
    gradient: Gradient
    worker: int
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class Load:
    token: str
    epoch: int
    delta: int
    slots: tuple[str, ...]
    dtype: int
    step_delta: int | None
    tensor_steps: tuple[int, ...]
    cut: int
    fault: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Pull:
    slots: tuple[str, ...]
    dtype: int
    chunk_bytes: int


@dataclasses.dataclass(frozen=True)
class Delete:
    pass


SLOTS = ("param", "exp_avg", "exp_avg_sq")
STREAMS = st.integers(0, 1)
WIRE_DTYPES = st.sampled_from([0, 0, 1, 2, 3])
TOKENS = st.sampled_from(["newest"] * 8 + ["none", "none", "older", "older", "foreign", "future"])
CONFIGS = st.builds(
    Config,
    layout=st.integers(0, len(LAYOUTS) - 1),
    policy=st.integers(0, 3),
    amsgrad=st.booleans(),
    decoupled=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.125]),
    maximize=st.booleans(),
    corrected=st.booleans(),
    zeros=st.sampled_from([True, True, True, False]),
    gradient_dtype=st.integers(0, 3),
    reply_dtype=st.integers(0, 3),
)
BEGIN_FAULTS = [
    "lr", "foreign", "entries", "gradient_dtype", "reply_dtype", "reply_chunk_bytes", "loss_scale", "missing_tensors",
    "weight", "base_step", "traceparent",
]  # fmt: skip
BEGIN_REFUSED = ["reply_mode"]
# Refused or not, as the session is.
BEGIN_DEPENDING = ["overlap", "patches"]
BEGINS = st.builds(
    Begin,
    delta=st.sampled_from([1] * 20 + [0] * 10 + [-1, 2, 2**53, LAST]),
    epoch=st.sampled_from([0] * 20 + [1] * 20 + [2, LAST]),
    load_delta=st.sampled_from([None] * 8 + [0] * 8 + [1, -1, LAST]),
    gradient_dtype=WIRE_DTYPES,
    reply_dtype=WIRE_DTYPES,
    reply_mode=st.sampled_from([0, 0, 1, 2]),
    lr=st.sampled_from([None, None, 0.0, 0.125]),
    maximize=st.sampled_from([None, None, False, True]),
    loss_scale=st.sampled_from([None, None, None, 1.0, 0.5, 1024.0]),
    fault=st.sampled_from([""] * 100 + BEGIN_FAULTS + BEGIN_REFUSED + BEGIN_DEPENDING),
)
GRADIENTS = st.builds(
    Gradient,
    seed=st.integers(0, 99),
    bad=st.sampled_from([None] * 8 + [float("nan"), float("inf"), -float("inf")]),
    where=st.integers(0, 300),
)
WHOLE_STEPS = st.builds(
    WholeStep,
    stream=STREAMS,
    begin=BEGINS,
    gradient=GRADIENTS,
    cuts=st.lists(st.integers(1, 262), max_size=4).map(tuple),
    seed=st.integers(0, 9),
    in_one=st.booleans(),
    slip=st.sampled_from([""] * 12 + ["left out", "twice", "short", "shifted", "empty"]),
)
FRAMES = st.builds(
    Frame,
    stream=STREAMS,
    begin=st.none() | BEGINS,
    chunk=st.none() | st.tuples(st.integers(0, 7), st.integers(0, 5)),
    extra_bytes=st.sampled_from([0] * 8 + [-4, -1, 1, 4]),
    commit=st.booleans(),
    faults=st.lists(st.sampled_from(["open", "rows", "clip", "payload", "garbage"]), max_size=1).map(tuple)
    | st.just(()),
    gradient=GRADIENTS,
)
LOAD_FAULTS = [
    "short", "gap", "overlap", "foreign slot", "no commit", "rows", "open", "payload", "garbage", "worker", "unopened",
]  # fmt: skip
ALIKE = st.builds(
    WholeStep,
    stream=st.sampled_from([0, 0, 0, 1]),
    begin=st.just(Begin()),
    gradient=GRADIENTS,
    cuts=st.just(()),
    seed=st.just(0),
    in_one=st.just(True),
    slip=st.just(""),
)
"""Steps that differ in their gradients alone, most of them on one stream: a compiled lane makes those."""

LOOP_CONFIGS = st.builds(
    Config,
    layout=st.just(0),
    policy=st.integers(0, 3),
    amsgrad=st.just(False),
    decoupled=st.just(False),
    weight_decay=st.just(0.125),
    maximize=st.just(False),
    corrected=st.just(True),
    zeros=st.just(True),
    gradient_dtype=st.sampled_from([0, 1]),
    reply_dtype=st.sampled_from([0, 1]),
)
"""Configs whose usual steps have one loop."""

OPERATIONS: st.SearchStrategy[Any] = st.one_of(
    *[WHOLE_STEPS] * 6,
    *[FRAMES] * 2,
    st.builds(
        Overtaken,
        stream=STREAMS,
        begin=BEGINS,
        gradient=GRADIENTS,
        token=st.sampled_from(["newest", "newest", "older", "none"]),
    ),
    st.builds(
        Open,
        stream=STREAMS,
        token=TOKENS,
        epoch=st.sampled_from([0, 0, 1, 1, 2]),
        worker=st.sampled_from([0] * 9 + [1]),
        durable_step=st.sampled_from([0] * 18 + [1, LAST]),
        fault=st.sampled_from([""] * 9 + ["begin", "payload", "unopened", "garbage"]),
    ),
    st.builds(Close, stream=STREAMS),
    st.builds(
        Unary,
        token=TOKENS,
        begin=BEGINS,
        gradient=GRADIENTS,
        worker=st.sampled_from([0] * 9 + [1]),
        extra_bytes=st.sampled_from([0] * 8 + [-4, -1, 1, 4]),
    ),
    st.builds(
        Load,
        token=TOKENS,
        epoch=st.sampled_from([0] * 8 + [1] * 8 + [2]),
        delta=st.sampled_from([1] * 10 + [0] * 3 + [-1, 2, LAST]),
        slots=st.permutations(SLOTS).map(tuple)
        | st.sampled_from([(), ("param", "velocity"), ("exp_avg",) * 2, ("max_exp_avg_sq",), *[("param",)] * 8]),
        dtype=st.sampled_from([0, 1, 2, 3] * 4 + [4]),
        step_delta=st.sampled_from([None] * 8 + [0, 1, 5, -1, 2**53]),
        tensor_steps=st.lists(st.sampled_from([0, 1, 2, 7, 7, 1000, 2**53]), max_size=3).map(tuple)
        | st.sampled_from([()] * 8),
        cut=st.integers(0, 300),
        fault=st.sampled_from([""] * 12 + LOAD_FAULTS),
        seed=st.integers(0, 99),
    ),
    st.builds(
        Pull,
        slots=st.permutations(SLOTS).map(tuple) | st.sampled_from([(), ("param",), ("velocity",), ("param",) * 2]),
        dtype=st.sampled_from([0, 1, 2, 3] * 3 + [4]),
        chunk_bytes=st.sampled_from([0, 4096] * 5 + [1]),
    ),
    st.sampled_from([Close(0), Close(1)] * 4 + [Delete()]),
)
