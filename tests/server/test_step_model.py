"""Sequences of messages against a model of a session, written from the contract and nothing else.

Hypothesis makes the sequences: steps good and bad, cut, shuffled, repeated, left half done; streams that open, fence
one another and end; unary steps, loads and pulls with every fault that fits. The model knows what must come of each
message: an answer with these numbers and these parameters, or one of a few statuses where a message has several
faults at once. Parameters are compared with a float64 Adam within a tolerance, and bit for bit with what the server
said before wherever nothing may have changed since.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

EXAMPLES = 2500 if os.environ.get("CI") else 300
MOST_OPERATIONS = 20

Status = tuple[str, str]
Vector = npt.NDArray[np.float64]

INVALID_FRAME = ("INVALID_ARGUMENT", "INVALID_FRAME")
INVALID_TENSOR = ("INVALID_ARGUMENT", "INVALID_TENSOR")
INVALID_CONFIG = ("INVALID_ARGUMENT", "INVALID_CONFIG")
NON_FINITE = ("INVALID_ARGUMENT", "NON_FINITE_GRADIENT")
UNSUPPORTED = ("FAILED_PRECONDITION", "UNSUPPORTED_FEATURE")
STALE_EPOCH = ("FAILED_PRECONDITION", "STALE_EPOCH")
FENCED = ("FAILED_PRECONDITION", "FENCED")
NOT_READY = ("FAILED_PRECONDITION", "SESSION_NOT_READY")
NOT_FOUND = ("NOT_FOUND", "SESSION_NOT_FOUND")
SUPERSEDED = ("ABORTED", "STEP_SUPERSEDED")
MISMATCH = ("ABORTED", "STEP_MISMATCH")

DTYPES: dict[int, Any] = {1: np.float32, 2: ml_dtypes.bfloat16, 3: np.float16}
HALF_ULP = {1: 2.0**-24, 2: 2.0**-8, 3: 2.0**-11}
LAST = 2**64 - 1
LAYOUTS: list[list[tuple[tuple[int, ...], int]]] = [
    [((3,), 0)],
    [((2, 2), 0), ((0, 5), 0), ((), 0)],
    [((5,), 0), ((4,), 1), ((3,), 1)],
    [((2,), 1), ((0,), 0)],
    [((0, 3), 0)],
]


# --- what is drawn -------------------------------------------------------------------------------------------


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
    """What opens a step; `delta` 1 is the next, 0 the last again."""

    delta: int = 1
    epoch: int = 0
    gradient_dtype: int = 0
    reply_dtype: int = 0
    reply_mode: int = 0
    lr: float | None = None
    maximize: bool | None = None
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
    slot: int
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
    slot: int
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class Load:
    token: str
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
TOKENS = st.sampled_from(["held"] * 8 + ["none", "none", "stale", "future"])
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
BEGIN_FAULTS = ["lr", "foreign", "entries", "gradient_dtype", "reply_dtype", "reply_chunk_bytes"]
BEGIN_REFUSED = ["loss_scale", "missing_tensors", "weight", "overlap", "reply_mode"]
BEGINS = st.builds(
    Begin,
    delta=st.sampled_from([1] * 20 + [0] * 4 + [-1, 2, 2**53, LAST]),
    epoch=st.sampled_from([0] * 10 + [1] * 10 + [2, LAST]),
    gradient_dtype=WIRE_DTYPES,
    reply_dtype=WIRE_DTYPES,
    reply_mode=st.sampled_from([0, 0, 1, 2]),
    lr=st.sampled_from([None, None, 0.0, 0.125]),
    maximize=st.sampled_from([None, None, False, True]),
    fault=st.sampled_from([""] * 100 + BEGIN_FAULTS + BEGIN_REFUSED),
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
    "short", "gap", "overlap", "foreign slot", "no commit", "rows", "open", "payload", "garbage", "slot", "unopened",
]  # fmt: skip
OPERATIONS: st.SearchStrategy[Any] = st.one_of(
    *[WHOLE_STEPS] * 6,
    *[FRAMES] * 2,
    st.builds(
        Open,
        stream=STREAMS,
        token=TOKENS,
        epoch=st.sampled_from([0, 0, 1, 1, 2]),
        slot=st.sampled_from([0] * 9 + [1]),
        fault=st.sampled_from([""] * 9 + ["begin", "payload", "unopened", "garbage"]),
    ),
    st.builds(Close, stream=STREAMS),
    st.builds(
        Unary,
        token=TOKENS,
        begin=BEGINS,
        gradient=GRADIENTS,
        slot=st.sampled_from([0] * 9 + [1]),
        extra_bytes=st.sampled_from([0] * 8 + [-4, -1, 1, 4]),
    ),
    st.builds(
        Load,
        token=TOKENS,
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


# --- the model ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Staged:
    """A step under way."""

    number: int
    replay: bool
    begin: Begin
    seen: npt.NDArray[np.bool_]
    values: Vector


@dataclasses.dataclass
class Answer:
    """What the answer to a committed step must say; `record` is the stored answer of a replay."""

    step: int
    parameters: Vector | None
    dtype: int
    skipped: bool = False
    non_finite: int = 0
    grad_norms: tuple[float, ...] = ()
    ts: tuple[int, ...] = ()
    numbers: tuple[float, bool] = (0.0, False)
    replay: bool = False


class Model:
    """One session, as the contract describes it."""

    lr = 1.0 / 64
    beta1, beta2, eps = 0.75, 0.875, 1.0 / 128

    def __init__(self, config: Config) -> None:
        self.config = config
        self.alive, self.ready = True, config.zeros
        self.token, self.applied_step, self.applied_load = 1, 0, 0
        self.record: Answer | None = None
        self.slots = (*SLOTS, "max_exp_avg_sq") if config.amsgrad else SLOTS
        self.spans: list[tuple[int, int, int]] = []
        members = LAYOUTS[config.layout]
        self.groups = 1 + max(group for _, group in members)
        self.size = 0
        for group in range(self.groups):
            self.size = -(-self.size // 256) * 256
            for shape, of in members:
                if of == group:
                    count = int(np.prod(shape))
                    self.spans.append((self.size, self.size + count, group))
                    self.size += count
        self.state = {slot: np.zeros(self.size) for slot in self.slots}
        self.t = [0] * len(self.spans)
        self.inside = np.zeros(self.size, bool)
        for start, end, _ in self.spans:
            self.inside[start:end] = True
        self.peak = 1.0

    def message(self) -> session_pb2.SessionConfig:
        """Make the config's message."""
        c = self.config
        return session_pb2.SessionConfig(
            tensors=[
                tensor_pb2.TensorSpec(name=f"t{index}", shape=shape, group=group)
                for index, (shape, group) in enumerate(LAYOUTS[c.layout])
            ],
            groups=[optimizer_pb2.ParameterGroup()] * self.groups,
            optimizer=optimizer_pb2.Optimizer(
                rule=optimizer_pb2.RULE_ADAM,
                formula=optimizer_pb2.FORMULA_TORCH if c.corrected else optimizer_pb2.FORMULA_NO_BIAS_CORRECTION,
                amsgrad=optimizer_pb2.AMSGRAD_RAW if c.amsgrad else optimizer_pb2.AMSGRAD_NONE,
                decoupled_weight_decay=c.decoupled,
                hyperparameters=optimizer_pb2.Hyperparameters(
                    lr=self.lr,
                    beta1=self.beta1,
                    beta2=self.beta2,
                    eps=self.eps,
                    weight_decay=c.weight_decay,
                    maximize=c.maximize,
                ),
            ),
            gradient=optimizer_pb2.GradientTreatment(non_finite=c.policy),  # type: ignore[arg-type]
            initialization=session_pb2.INITIALIZATION_ZEROS if c.zeros else session_pb2.INITIALIZATION_LOAD,
            gradient_dtype=c.gradient_dtype,  # type: ignore[arg-type]
            reply_dtype=c.reply_dtype,  # type: ignore[arg-type]
        )

    # Dtypes of a step: its own, else the session's, else float32.

    def gradient_dtype(self, begin: Begin) -> int:
        return begin.gradient_dtype or self.config.gradient_dtype or 1

    def reply_dtype(self, begin: Begin) -> int:
        return begin.reply_dtype or self.config.reply_dtype or 1

    def step_number(self, begin: Begin) -> int:
        return min(max(self.applied_step + begin.delta, 0), LAST)

    def is_replay(self, number: int) -> bool:
        return number == self.applied_step and self.record is not None

    # Faults: what a message may be refused for.

    def begin_faults(self, begin: Begin, token: int) -> set[Status]:
        faults = self.holder_faults(token, begin.epoch)
        number = self.step_number(begin)
        if not self.ready:
            faults.add(NOT_READY)
        if number != self.applied_step + 1 and not self.is_replay(number):
            faults.add(SUPERSEDED if number <= self.applied_step else MISMATCH)
        if begin.fault in BEGIN_FAULTS:
            faults.add(INVALID_CONFIG)
        if begin.fault in BEGIN_REFUSED:
            faults.add(UNSUPPORTED)
        return faults

    def holder_faults(self, token: int, epoch: int = 0) -> set[Status]:
        faults = set()
        if not self.alive:
            faults.add(NOT_FOUND)
        if token != self.token:
            faults.add(FENCED)
        if epoch not in (0, 1):
            faults.add(STALE_EPOCH)
        return faults

    def stage(self, begin: Begin) -> Staged:
        number = self.step_number(begin)
        return Staged(number, self.is_replay(number), begin, np.zeros(self.size, bool), np.zeros(self.size))

    def chunk_faults(self, staged: Staged, offset: int, count: int, payload: bytes) -> set[Status]:
        """Refuse a chunk, or note it."""
        if staged.replay:
            return set()
        dtype = np.dtype(DTYPES[self.gradient_dtype(staged.begin)])
        if len(payload) != count * dtype.itemsize or count < 1 or offset + count > self.size:
            return {INVALID_TENSOR}
        if staged.seen[offset : offset + count].any():
            return {INVALID_TENSOR}
        staged.seen[offset : offset + count] = True
        staged.values[offset : offset + count] = np.frombuffer(payload, dtype).astype(np.float64)
        return set()

    def commit_faults(self, staged: Staged) -> set[Status]:
        if staged.replay:
            return set()
        faults = set()
        if not staged.seen.all():
            faults.add(INVALID_TENSOR)
        if self.non_finite(staged) and self.config.policy in (0, 1):
            faults.add(NON_FINITE)
        return faults

    def non_finite(self, staged: Staged) -> int:
        return int((~np.isfinite(staged.values) & self.inside).sum())

    # What is committed.

    def commit(self, staged: Staged) -> Answer:
        """Apply a step, or replay it; returns what must be answered."""
        begin = staged.begin
        wanted = begin.reply_mode != 2
        dtype = self.reply_dtype(begin)
        if staged.replay:
            assert self.record is not None
            parameters = self.state["param"].copy() if wanted else None
            return dataclasses.replace(self.record, parameters=parameters, dtype=dtype, replay=True)
        numbers = (
            self.lr if begin.lr is None else begin.lr,
            self.config.maximize if begin.maximize is None else begin.maximize,
        )
        count = self.non_finite(staged)
        skipped = bool(count) and self.config.policy == 2
        if not skipped:
            with np.errstate(all="ignore"):
                for index, (start, end, _) in enumerate(self.spans):
                    self.t[index] += 1
                    self.update(slice(start, end), staged.values[start:end], self.t[index], *numbers)
        self.applied_step = staged.number
        self.record = Answer(
            step=staged.number,
            parameters=self.state["param"].copy() if wanted else None,
            dtype=dtype,
            skipped=skipped,
            non_finite=count,
            grad_norms=tuple(self.norm(staged.values, group) for group in range(self.groups)),
            ts=tuple(
                max(t for t, (_, _, of) in zip(self.t, self.spans, strict=True) if of == group)
                for group in range(self.groups)
            ),
            numbers=numbers,
        )
        return self.record

    def norm(self, values: Vector, group: int) -> float:
        """Take the Euclidean norm of a group's part."""
        return float(np.sqrt(sum((values[start:end] ** 2).sum() for start, end, of in self.spans if of == group)))

    def update(self, where: slice, g: Vector, t: int, lr: float, maximize: bool) -> None:
        """Adam, from the paper and torch's documentation, in float64.

        The first moment is moved towards g as torch moves it, which makes a difference only after infinity.
        """
        c, s = self.config, self.state
        g = -g if maximize else g
        p = s["param"][where]
        if c.decoupled:
            p = p * (1 - lr * c.weight_decay)
        elif c.weight_decay:
            g = g + c.weight_decay * p
        m = s["exp_avg"][where]
        m = s["exp_avg"][where] = m + (1 - self.beta1) * (g - m)
        v = s["exp_avg_sq"][where] = self.beta2 * s["exp_avg_sq"][where] + (1 - self.beta2) * g * g
        if c.amsgrad:
            v = s["max_exp_avg_sq"][where] = np.maximum(s["max_exp_avg_sq"][where], v)
        c1 = 1 - self.beta1**t if c.corrected else 1.0
        c2 = 1 - self.beta2**t if c.corrected else 1.0
        s["param"][where] = p - lr * (m / c1) / (np.sqrt(v / c2) + self.eps)
        finite = np.abs(s["param"][where])
        self.peak = max(self.peak, float(np.max(finite, initial=0.0, where=np.isfinite(finite))))

    def tolerance(self, dtype: int, values: Vector) -> Vector:
        """Float32 roundings of a dozen steps, at the largest value there was, and one of the encoding."""
        tolerance: Vector = 4e-6 * self.peak + 1.01 * HALF_ULP[dtype] * np.abs(values) + 1e-7
        return tolerance


# --- the runner -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stream:
    """An attached stream, and the step it is in."""

    handle: Any
    token: int
    staged: Staged | None = None


class Run:
    """Does to the server what the operations say and holds every answer against the model."""

    def __init__(self, wire: Any, refused: type[Exception], config: Config) -> None:
        self.model = Model(config)
        self.wire = wire
        self.refused = refused
        created = wire.create(self.model.message())
        self.id = created.session.session_id
        assert created.attach_token == 1
        assert created.session.layout.size == self.model.size
        assert list(created.session.layout.slots) == list(self.model.slots)
        self.streams: dict[int, Stream] = {}
        self.bits: bytes | None = None  # the float32 parameters, while they are known
        self.stored: step_pb2.StepResult | None = None

    def do(self, operation: Any) -> None:
        """Do one operation, unless a step is under way on a stream that it is not about.

        Nothing answers `begin` and chunks, so only the stream itself knows when the server has read them.
        """
        busy = [index for index, stream in self.streams.items() if stream.staged is not None]
        if busy and getattr(operation, "stream", None) != busy[0]:
            return
        event(type(operation).__name__)
        getattr(self, type(operation).__name__.lower())(operation)

    def close_all(self) -> None:
        for index in list(self.streams):
            self.close(Close(index))

    # Each operation.

    def open(self, operation: Open) -> None:
        self.close(Close(operation.stream))
        model, token = self.model, self.token(operation.token)
        handle = self.wire.open()
        first = pb.AttachRequest(
            open=pb.AttachOpen(session_id=self.id, slot=operation.slot, attach_token=token, epoch=operation.epoch)
        )
        faults = model.holder_faults(token or model.token, operation.epoch)
        if operation.slot:
            faults.add(UNSUPPORTED)
        if operation.fault:
            faults.add(INVALID_FRAME)
        if operation.fault == "begin":
            first.begin.step = 1
        elif operation.fault == "payload":
            first.payload = b"1234"
        elif operation.fault == "unopened":
            first.ClearField("open")
        handle.send(b"\xff\xff" if operation.fault == "garbage" else first)
        if faults:
            self.expect_refusal(handle, faults)
            return
        opened = pb.AttachResponse.FromString(handle.receive()).opened
        model.token += 0 if token else 1
        assert (opened.attach_token, opened.epoch) == (model.token, 1)
        assert (opened.applied_step, opened.applied_load) == (model.applied_step, model.applied_load)
        assert (opened.ready, opened.durable_step) == (model.ready, 0)
        self.streams[operation.stream] = Stream(handle, model.token)

    def close(self, operation: Close) -> None:
        stream = self.streams.pop(operation.stream, None)
        if stream is None:
            return
        stream.handle.finish()
        if stream.staged is not None:
            self.expect_refusal(stream.handle, {INVALID_FRAME})
        else:
            with pytest.raises(StopIteration):
                stream.handle.receive()

    def wholestep(self, operation: WholeStep) -> None:
        if operation.stream not in self.streams:
            self.open(Open(operation.stream, "held", 1, 0, ""))
        elif self.streams[operation.stream].staged is not None:
            self.close(Close(operation.stream))
            self.open(Open(operation.stream, "held", 1, 0, ""))
        model = self.model
        values = operation.gradient.values(model.size)
        cuts = sorted({0, model.size, *(cut for cut in operation.cuts if cut < model.size)})
        spans = [(start, end - start) for start, end in zip(cuts, cuts[1:], strict=False)]
        np.random.default_rng(operation.seed).shuffle(spans)
        dtype = model.gradient_dtype(operation.begin)
        messages = [self.chunk_message(offset, count, values, dtype) for offset, count in map(tuple, spans)]
        if messages:
            slip(messages, operation.slip)
        if operation.in_one and len(messages) == 1:
            frames = [(operation.begin, messages[0], True)]
        else:
            frames = [
                (operation.begin, None, False),
                *((None, message, False) for message in messages),
                (None, None, True),
            ]
        for begin, message, commit in frames:
            if operation.stream not in self.streams:
                return
            request = message or pb.AttachRequest()
            self.send(operation.stream, begin, request, commit=commit)

    def frame(self, operation: Frame) -> None:
        if operation.stream not in self.streams:
            return
        model = self.model
        request = pb.AttachRequest()
        staged = self.streams[operation.stream].staged
        current = operation.begin or (staged.begin if staged else Begin())
        if operation.chunk is not None:
            size = model.size
            offset = [0, size // 3, size // 2, size - 1, size, size + 1, 2**63, LAST][operation.chunk[0]]
            offset = max(offset, 0)
            count = [0, 1, size // 3, max(size - offset, 0), size, 2**62 + 1][operation.chunk[1]]
            values = operation.gradient.values(size)
            request = self.chunk_message(offset, count, values, model.gradient_dtype(current), operation.extra_bytes)
        if "open" in operation.faults:
            request.open.session_id = self.id
        if "rows" in operation.faults and operation.chunk is not None:
            request.chunk.rows.append(0)
        if "payload" in operation.faults and operation.chunk is None:
            request.payload = b"12345678"
        self.send(
            operation.stream,
            operation.begin,
            request,
            commit=operation.commit,
            clip="clip" in operation.faults,
            garbage="garbage" in operation.faults,
        )

    def unary(self, operation: Unary) -> None:
        model, token = self.model, self.token(operation.token)
        dtype = np.dtype(DTYPES[model.gradient_dtype(operation.begin)])
        payload = operation.gradient.values(model.size).astype(dtype).tobytes()
        payload = resized(payload, operation.extra_bytes)
        request = pb.StepRequest(
            session_id=self.id,
            slot=operation.slot,
            attach_token=token,
            begin=self.begin_message(operation.begin),
            payload=payload,
        )
        faults = model.begin_faults(operation.begin, token)
        if operation.slot:
            faults.add(UNSUPPORTED)
        staged = model.stage(operation.begin)
        if model.size or payload:
            faults |= model.chunk_faults(staged, 0, model.size, payload)
        faults |= model.commit_faults(staged)
        if faults:
            self.expect_refused_call(faults, "Step", request)
            return
        answer = pb.StepResponse.FromString(self.wire.unary("Step", request))
        self.check_answer(model.commit(staged), answer.result, answer.payload)

    def load(self, operation: Load) -> None:
        model, token = self.model, self.token(operation.token)
        number = min(max(model.applied_load + operation.delta, 0), LAST)
        replay = number == model.applied_load and number > 0
        step = None if operation.step_delta is None else min(max(model.applied_step + operation.step_delta, 0), LAST)
        opening = pb.LoadOpen(
            session_id=self.id,
            worker_slot=1 if operation.fault == "slot" else 0,
            attach_token=token,
            load=number,
            slots=operation.slots,
            dtype=operation.dtype,  # type: ignore[arg-type]
            step=step,
            tensor_steps=operation.tensor_steps,
        )
        faults = model.holder_faults(token)
        names = operation.slots
        if not names or len(set(names)) < len(names) or not set(names) <= set(model.slots):
            faults.add(INVALID_CONFIG)
        if len(operation.tensor_steps) not in (0, len(model.spans)) or max((0, *operation.tensor_steps)) >= 2**53:
            faults.add(INVALID_CONFIG)
        if step is not None and step >= 2**53:
            faults.add(INVALID_CONFIG)
        if operation.fault == "slot":
            faults.add(UNSUPPORTED)
        if operation.fault == "unopened":
            faults.add(INVALID_FRAME)
        if not replay:
            if number != model.applied_load + 1:
                faults.add(SUPERSEDED if number <= model.applied_load else MISMATCH)
            if step is not None and step < model.applied_step:
                faults.add(SUPERSEDED)
        values = self.loaded_values(operation)
        messages, body_faults = self.load_messages(operation, values)
        if faults or (body_faults and not replay):
            allowed = faults | body_faults
            self.expect_refused_stream(allowed, "Load", [pb.LoadRequest(open=opening), *messages], operation)
            return
        (data,) = self.wire.stream("Load", [pb.LoadRequest(open=opening), *messages])
        answer = pb.LoadResponse.FromString(data)
        assert answer.replayed is replay
        event("load replayed" if replay else "loaded")
        if not replay:
            model.applied_load = number
            for slot, value in values.items():
                model.state[slot] = np.where(model.inside, value, 0.0)
            if step is not None and step != model.applied_step:
                model.applied_step, model.record, self.stored = step, None, None
            if operation.tensor_steps:
                model.t = list(operation.tensor_steps)
            model.ready = model.ready or "param" in names
            model.peak = max(model.peak, 2.0)
            self.bits = None
        assert (answer.session.applied_load, answer.session.applied_step) == (model.applied_load, model.applied_step)
        assert answer.session.ready is model.ready

    def pull(self, operation: Pull) -> None:
        model = self.model
        request = pb.PullRequest(
            session_id=self.id,
            slots=operation.slots,
            dtype=operation.dtype,  # type: ignore[arg-type]
            chunk_bytes=operation.chunk_bytes,
        )
        faults = set()
        if not model.alive:
            faults.add(NOT_FOUND)
        if not model.ready:
            faults.add(NOT_READY)
        names = operation.slots
        if len(set(names)) < len(names) or not set(names) <= set(model.slots):
            faults.add(INVALID_CONFIG)
        if operation.dtype == 4 or operation.chunk_bytes == 1:
            faults.add(INVALID_CONFIG)
        if faults:
            self.expect_refused_stream(faults, "Pull", [request])
            return
        self.check_state(request)

    def delete(self, operation: Delete) -> None:
        model = self.model
        request = pb.DeleteSessionRequest(session_id=self.id)
        if not model.alive:
            self.expect_refused_call({NOT_FOUND}, "DeleteSession", request)
            return
        answer = pb.DeleteSessionResponse.FromString(self.wire.unary("DeleteSession", request))
        assert answer.applied_step == model.applied_step
        model.alive = False

    # Messages.

    def token(self, kind: str) -> int:
        return {"held": self.model.token, "none": 0, "stale": self.model.token - 1 or LAST, "future": LAST}[kind]

    def begin_message(self, begin: Begin) -> step_pb2.StepBegin:
        message = step_pb2.StepBegin(
            step=self.model.step_number(begin),
            epoch=begin.epoch,
            gradient_dtype=begin.gradient_dtype,  # type: ignore[arg-type]
            reply_dtype=begin.reply_dtype,  # type: ignore[arg-type]
            reply_mode=begin.reply_mode,  # type: ignore[arg-type]
        )
        if begin.lr is not None or begin.maximize is not None:
            message.hyperparameters.add(lr=begin.lr, maximize=begin.maximize)
        spoil(message, begin.fault)
        return message

    def chunk_message(
        self, offset: int, count: int, values: Vector, dtype: int, extra_bytes: int = 0
    ) -> pb.AttachRequest:
        payload = values[min(offset, len(values)) :][:count].astype(DTYPES[dtype]).tobytes()
        return pb.AttachRequest(
            chunk=tensor_pb2.Chunk(offset=offset, count=count), payload=resized(payload, extra_bytes)
        )

    def loaded_values(self, operation: Load) -> dict[str, Vector]:
        """Draw what is loaded, padding included, which the server must ignore; second moments are never negative."""
        generator = np.random.default_rng(operation.seed)
        values = {slot: generator.integers(-8, 9, self.model.size) / 8.0 for slot in dict.fromkeys(operation.slots)}
        return {slot: np.abs(value) if slot.endswith("_sq") else value for slot, value in values.items()}

    def load_messages(self, operation: Load, values: dict[str, Vector]) -> tuple[list[Any], set[Status]]:
        """Make the messages after a load's opening, with one fault or none, and tell what they may be refused for."""
        size, dtype = self.model.size, DTYPES.get(operation.dtype or 1)
        faults: set[Status] = set() if dtype is not None else {INVALID_CONFIG}
        cut = operation.cut % max(size, 1)
        messages: list[Any] = []
        for slot, value in values.items():
            for start, end in ((cut, size), (0, cut)):
                if start < end:
                    payload = value[start:end].astype(dtype or np.float32).tobytes()
                    messages.append(
                        pb.LoadRequest(
                            slot=slot, chunk=tensor_pb2.Chunk(offset=start, count=end - start), payload=payload
                        )
                    )
        fault = operation.fault
        if messages:
            if fault == "short":
                messages[0].payload = messages[0].payload[:-1]
                faults.add(INVALID_TENSOR)
            elif fault == "gap":
                del messages[0]
                faults.add(INVALID_TENSOR)
            elif fault == "overlap":
                messages.append(messages[0])
                faults.add(INVALID_TENSOR)
            elif fault == "rows":
                messages[0].chunk.rows.append(0)
                faults.add(UNSUPPORTED)
            elif fault == "foreign slot":
                messages[0].slot = "velocity"
                faults.add(INVALID_CONFIG)
        if fault == "open":
            messages.append(pb.LoadRequest(open=pb.LoadOpen(session_id=self.id)))
            faults.add(INVALID_FRAME)
        elif fault == "payload":
            messages.append(pb.LoadRequest(payload=b"123"))
            faults.add(INVALID_FRAME)
        elif fault == "garbage":
            messages.append(b"\xff\xff")
            faults.add(INVALID_FRAME)
        if fault == "no commit":
            faults.add(INVALID_FRAME)
        else:
            messages.append(pb.LoadRequest(commit=True))
        return messages, faults

    # One message of a stream, and what must come of it.

    def send(
        self,
        index: int,
        begin: Begin | None,
        request: pb.AttachRequest,
        *,
        commit: bool = False,
        clip: bool = False,
        garbage: bool = False,
    ) -> None:
        stream, model = self.streams[index], self.model
        if begin is not None:
            request.begin.CopyFrom(self.begin_message(begin))
        if commit:
            request.commit.SetInParent()
            if clip:
                request.commit.clip_coefficient = 0.5
        stream.handle.send(b"\xff\xff" if garbage else request)
        faults = {INVALID_FRAME} if garbage else self.frame_faults(stream, begin, request)
        if faults:
            del self.streams[index]
            self.expect_refusal(stream.handle, faults)
        elif commit:
            assert stream.staged is not None
            staged, stream.staged = stream.staged, None
            self.read_answer(stream, model.commit(staged))

    def frame_faults(self, stream: Stream, begin: Begin | None, request: pb.AttachRequest) -> set[Status]:
        model, faults = self.model, set()
        if (begin is None) == (stream.staged is None):
            faults.add(INVALID_FRAME)
        if begin is not None and stream.staged is None:
            faults |= model.begin_faults(begin, stream.token)
            stream.staged = model.stage(begin)
        if request.HasField("open"):
            faults.add(INVALID_FRAME)
        if request.HasField("chunk"):
            if request.chunk.rows:
                faults.add(UNSUPPORTED)
            if stream.staged is not None:
                faults |= model.chunk_faults(stream.staged, request.chunk.offset, request.chunk.count, request.payload)
        elif request.payload:
            faults.add(INVALID_FRAME)
        if request.HasField("commit"):
            if request.commit.HasField("clip_coefficient"):
                faults.add(UNSUPPORTED)
            if stream.staged is not None:
                faults |= model.commit_faults(stream.staged)
        return faults

    def read_answer(self, stream: Stream, answer: Answer) -> None:
        payload, covered = b"", 0
        while True:
            message = pb.AttachResponse.FromString(stream.handle.receive())
            if message.HasField("chunk"):
                assert message.chunk.offset == covered
                covered += message.chunk.count
                payload += message.payload
            if message.HasField("result"):
                break
        assert covered == (0 if answer.parameters is None else self.model.size)
        self.check_answer(answer, message.result, payload)

    # Comparisons.

    def check_answer(self, answer: Answer, result: step_pb2.StepResult, payload: bytes) -> None:
        telemetry = result.telemetry
        assert (result.step, result.epoch, result.durable_step) == (answer.step, 1, 0)
        assert (result.replayed, result.skipped) == (answer.replay, answer.skipped)
        assert telemetry.non_finite_count == answer.non_finite
        assert telemetry.clip_coefficient == 1.0
        assert [group.t for group in telemetry.groups] == list(answer.ts)
        norms = [group.grad_norm for group in telemetry.groups]
        np.testing.assert_allclose(norms, answer.grad_norms, rtol=1e-6)
        np.testing.assert_allclose(telemetry.grad_norm, np.sqrt(np.sum(np.square(answer.grad_norms))), rtol=1e-6)
        for group in telemetry.groups:
            used = group.hyperparameters
            assert (used.lr, used.maximize) == answer.numbers
            assert (used.beta1, used.beta2, used.eps) == (self.model.beta1, self.model.beta2, self.model.eps)
            assert used.weight_decay == self.model.config.weight_decay
        event("replayed" if answer.replay else "skipped" if answer.skipped else "applied")
        if answer.replay:
            result.replayed = False
            assert result == self.stored, "a replay tells what was told the first time"
        else:
            self.stored = step_pb2.StepResult()
            self.stored.CopyFrom(result)
            if not answer.skipped:
                self.bits = None
        if answer.parameters is None:
            assert payload == b""
        else:
            self.check_parameters(payload, answer.dtype)

    def check_parameters(self, payload: bytes, dtype: int) -> None:
        """Compare with the model, and bit for bit with the masters where they are known."""
        got = np.frombuffer(payload, DTYPES[dtype])
        self.check_values(got, self.model.state["param"], dtype)
        if self.bits is not None:
            with np.errstate(over="ignore"):
                assert payload == np.frombuffer(self.bits, np.float32).astype(DTYPES[dtype]).tobytes()
        elif dtype == 1:
            self.bits = payload

    def check_values(self, got: Any, want: Vector, dtype: int) -> None:
        assert len(got) == len(want)
        values = got.astype(np.float64)
        assert (values[~self.model.inside] == 0).all(), "padding is zero when received"
        assert np.array_equal(np.isnan(values), np.isnan(want))
        finite = np.isfinite(want)
        error = np.abs(values[finite] - want[finite])
        assert (error <= self.model.tolerance(dtype, want[finite])).all(), f"off by {error.max()}"

    def check_state(self, request: pb.PullRequest) -> None:
        model, dtype = self.model, request.dtype or 1
        first, *chunks = map(pb.PullResponse.FromString, self.wire.stream("Pull", [request]))
        header = first.header
        assert (header.step, header.load, header.epoch) == (model.applied_step, model.applied_load, 1)
        assert list(header.tensor_steps) == model.t
        values: dict[str, bytes] = {}
        for chunk in chunks:
            before = values.get(chunk.slot, b"")
            assert chunk.chunk.offset == len(before) // np.dtype(DTYPES[dtype]).itemsize
            assert len(chunk.payload) == chunk.chunk.count * np.dtype(DTYPES[dtype]).itemsize
            values[chunk.slot] = before + chunk.payload
        assert list(values) == (list(request.slots) or ["param"] if model.size else [])
        for slot, payload in values.items():
            if slot == "param":
                self.check_parameters(payload, dtype)
            else:
                self.check_values(np.frombuffer(payload, DTYPES[dtype]), model.state[slot], dtype)

    def check_everything(self) -> None:
        """Pull all there is, or find that there is nothing."""
        model = self.model
        if not model.alive:
            self.expect_refused_call({NOT_FOUND}, "GetSession", pb.GetSessionRequest(session_id=self.id))
            return
        session = self.wire.get(self.id)
        assert (session.applied_step, session.applied_load) == (model.applied_step, model.applied_load)
        assert (session.ready, session.attached) == (model.ready, False)
        if model.ready:
            self.check_state(pb.PullRequest(session_id=self.id, slots=model.slots))
        self.delete(Delete())

    # Refusals.

    def expect_refusal(self, handle: Any, faults: set[Status]) -> None:
        with pytest.raises(self.refused) as caught:
            handle.receive()
        self.check_refusal(caught.value, faults)

    def expect_refused_call(self, faults: set[Status], method: str, request: Any) -> None:
        with pytest.raises(self.refused) as caught:
            self.wire.unary(method, request)
        self.check_refusal(caught.value, faults)

    def expect_refused_stream(
        self, faults: set[Status], method: str, requests: Sequence[Any], operation: Load | None = None
    ) -> None:
        if operation is not None and operation.fault == "unopened":
            requests = requests[1:]
        with pytest.raises(self.refused) as caught:
            self.wire.stream(method, requests)
        self.check_refusal(caught.value, faults)

    def check_refusal(self, refused: Any, faults: set[Status]) -> None:
        assert (refused.code, refused.reason) in faults, refused.text
        event(refused.reason)


def resized(payload: bytes, extra_bytes: int) -> bytes:
    return payload + bytes(extra_bytes) if extra_bytes >= 0 else payload[:extra_bytes]


def slip(messages: list[pb.AttachRequest], kind: str) -> None:
    """Spoil one chunk of a step."""
    if kind == "left out":
        messages.pop()
    elif kind == "twice":
        messages.append(messages[0])
    elif kind == "short":
        messages[-1].payload = messages[-1].payload[:-1]
    elif kind == "shifted":
        messages[-1].chunk.offset += 1
    elif kind == "empty":
        messages.insert(0, pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=0, count=0)))


def spoil(message: step_pb2.StepBegin, fault: str) -> None:
    """Ask for something that is out of range, or not served."""
    if fault == "lr":
        del message.hyperparameters[:]
        message.hyperparameters.add(lr=-1.0)
    elif fault == "foreign":
        del message.hyperparameters[:]
        message.hyperparameters.add(momentum=0.5)
    elif fault == "entries":
        message.hyperparameters.extend([optimizer_pb2.Hyperparameters()] * 5)
    elif fault in ("gradient_dtype", "reply_dtype"):
        setattr(message, fault, 4)
    elif fault == "reply_chunk_bytes":
        message.reply_chunk_bytes = 7
    elif fault == "loss_scale":
        message.loss_scale = 1.0
    elif fault == "missing_tensors":
        message.missing_tensors.append(0)
    elif fault == "weight":
        message.weight = 1.0
    elif fault == "overlap":
        message.overlap = True
    elif fault == "reply_mode":
        message.reply_mode = step_pb2.REPLY_MODE_CHANGED


@pytest.fixture(scope="module")
def channel(server: Any, connect: Any) -> Iterator[Any]:
    with connect(server.target) as wire:
        yield wire


@pytest.fixture(scope="module")
def refused_type(channel: Any) -> type[Exception]:
    with pytest.raises(Exception) as caught:
        channel.get("nobody")
    return caught.type


@given(config=CONFIGS, operations=st.lists(OPERATIONS, min_size=1, max_size=MOST_OPERATIONS))
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_whatever_is_sent_the_session_does_what_the_contract_says(
    channel: Any, refused_type: type[Exception], config: Config, operations: list[Any]
) -> None:
    run = Run(channel, refused_type, config)
    try:
        for operation in operations:
            run.do(operation)
        run.close_all()
        run.check_everything()
    finally:
        for stream in run.streams.values():
            stream.handle.cancel()
