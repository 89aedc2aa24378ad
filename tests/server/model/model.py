"""One session, as the contract describes it and nothing else: the outcome of each message."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from stepwire.v1 import optimizer_pb2, session_pb2, tensor_pb2
from tests.server.model.operations import BEGIN_FAULTS, BEGIN_REFUSED, LAST, LAYOUTS, SLOTS, Begin, Config, Vector

Status = tuple[str, str]

INVALID_FRAME = ("INVALID_ARGUMENT", "INVALID_FRAME")
INVALID_TENSOR = ("INVALID_ARGUMENT", "INVALID_TENSOR")
INVALID_CONFIG = ("INVALID_ARGUMENT", "INVALID_CONFIG")
NON_FINITE = ("INVALID_ARGUMENT", "NON_FINITE_GRADIENT")
UNSUPPORTED = ("FAILED_PRECONDITION", "UNSUPPORTED_FEATURE")
STALE_EPOCH = ("FAILED_PRECONDITION", "STALE_EPOCH")
FENCED = ("FAILED_PRECONDITION", "FENCED")
DISPLACED = ("UNAVAILABLE", "STREAM_DISPLACED")
STATE_CHANGED = ("ABORTED", "STATE_CHANGED")
DURABLE_STEP_LOST = ("DATA_LOSS", "DURABLE_STEP_LOST")
NOT_READY = ("FAILED_PRECONDITION", "SESSION_NOT_READY")
NOT_FOUND = ("NOT_FOUND", "SESSION_NOT_FOUND")
SUPERSEDED = ("ABORTED", "STEP_SUPERSEDED")
MISMATCH = ("ABORTED", "STEP_MISMATCH")

DTYPES: dict[int, Any] = {1: np.float32, 2: ml_dtypes.bfloat16, 3: np.float16}
HALF_ULP = {1: 2.0**-24, 2: 2.0**-8, 3: 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Hold:
    """The hold of a stream: its number, and the number with which its client acquired the worker."""

    number: int
    acquired: int


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
    """The content of the answer to a committed step."""

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
    """One session, as the contract describes it.

    Attributes:
        hold: the present hold of the worker.
        last: the answer to the last step, for its replay.
    """

    lr = 1.0 / 64
    beta1, beta2, eps = 0.75, 0.875, 1.0 / 128

    def __init__(self, config: Config) -> None:
        self.config = config
        self.alive, self.ready = True, config.zeros
        self.hold = Hold(1, 1)
        self.applied_step, self.applied_load = 0, 0
        self.last: Answer | None = None
        self.slots = (*SLOTS, "max_exp_avg_sq") if config.amsgrad else SLOTS
        self.ranges: list[tuple[int, int, int]] = []
        members = LAYOUTS[config.layout]
        self.groups = 1 + max(group for _, group in members)
        self.size = 0
        for group in range(self.groups):
            self.size = -(-self.size // 256) * 256
            for shape, of in members:
                if of == group:
                    count = int(np.prod(shape))
                    self.ranges.append((self.size, self.size + count, group))
                    self.size += count
        self.state = {slot: np.zeros(self.size) for slot in self.slots}
        self.t = [0] * len(self.ranges)
        self.inside = np.zeros(self.size, bool)
        for start, end, _ in self.ranges:
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

    def load_number(self, begin: Begin) -> int | None:
        return None if begin.load_delta is None else min(max(self.applied_load + begin.load_delta, 0), LAST)

    def is_replay(self, number: int) -> bool:
        return number == self.applied_step and self.last is not None

    @property
    def allows_overlap(self) -> bool:
        """Such steps are those of tests/server/steps/test_overlap.py; here they are only refused."""
        return self.config.policy == optimizer_pb2.NON_FINITE_POLICY_ALLOW

    # Holds of the worker.

    def attach(self, number: int) -> Hold:
        """Note an attach that was accepted; returns its hold."""
        new = self.hold.number + 1
        self.hold = Hold(new, self.hold.acquired if number else new)
        return self.hold

    # Faults: the refusals that a message may lead to.

    def begin_faults(self, begin: Begin) -> set[Status]:
        faults = self.session_faults(begin.epoch)
        number = self.step_number(begin)
        if not self.ready:
            faults.add(NOT_READY)
        if self.load_number(begin) not in (None, self.applied_load):
            faults.add(STATE_CHANGED)
        if number != self.applied_step + 1 and not self.is_replay(number):
            faults.add(SUPERSEDED if number <= self.applied_step else MISMATCH)
        if begin.fault in BEGIN_FAULTS:
            faults.add(INVALID_CONFIG)
        if begin.fault in BEGIN_REFUSED:
            faults.add(UNSUPPORTED)
        if begin.fault == "overlap" and not self.allows_overlap:
            faults.add(INVALID_CONFIG)
        if begin.fault == "patches" and self.reply_dtype(begin) != tensor_pb2.DTYPE_BFLOAT16:
            faults.add(INVALID_CONFIG)
        return faults

    def session_faults(self, epoch: int = 0) -> set[Status]:
        faults = set()
        if not self.alive:
            faults.add(NOT_FOUND)
        if epoch not in (0, 1):
            faults.add(STALE_EPOCH)
        return faults

    def attach_faults(self, number: int, epoch: int, durable_step: int) -> set[Status]:
        faults = self.session_faults(epoch)
        if number and not self.hold.acquired <= number <= self.hold.number:
            faults.add(FENCED)
        if durable_step:
            faults.add(DURABLE_STEP_LOST)
        return faults

    def call_faults(self, number: int) -> set[Status]:
        """Return the fault of a call that does not bring the newest token: one of its own client, or another's."""
        if number == self.hold.number:
            return set()
        return {DISPLACED if self.hold.acquired <= number < self.hold.number else FENCED}

    def hold_faults(self, hold: Hold) -> set[Status]:
        """Return the fault of a stream that has been displaced: by its own client, or by another."""
        if hold == self.hold:
            return set()
        return {DISPLACED if hold.acquired == self.hold.acquired else FENCED}

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
        values = np.frombuffer(payload, dtype).astype(np.float64)
        staged.values[offset : offset + count] = values / (staged.begin.loss_scale or 1.0)
        return set()

    def commit_faults(self, staged: Staged) -> set[Status]:
        if staged.replay:
            return set()
        faults = set()
        if not staged.seen[self.inside].all():
            faults.add(INVALID_TENSOR)
        if self.non_finite(staged) and self.config.policy in (0, 1):
            faults.add(NON_FINITE)
        return faults

    def non_finite(self, staged: Staged) -> int:
        return int((~np.isfinite(staged.values) & self.inside).sum())

    # What is committed.

    def commit(self, staged: Staged) -> Answer:
        """Apply a step, or replay it; returns the answer that must come."""
        begin = staged.begin
        wanted = begin.reply_mode != 2
        dtype = self.reply_dtype(begin)
        if staged.replay:
            assert self.last is not None
            parameters = self.state["param"].copy() if wanted else None
            return dataclasses.replace(self.last, parameters=parameters, dtype=dtype, replay=True)
        numbers = (
            self.lr if begin.lr is None else begin.lr,
            self.config.maximize if begin.maximize is None else begin.maximize,
        )
        count = self.non_finite(staged)
        skipped = bool(count) and self.config.policy == 2
        if not skipped:
            with np.errstate(all="ignore"):
                for index, (start, end, _) in enumerate(self.ranges):
                    self.t[index] += 1
                    self.update(slice(start, end), staged.values[start:end], self.t[index], *numbers)
        self.applied_step = staged.number
        self.last = Answer(
            step=staged.number,
            parameters=self.state["param"].copy() if wanted else None,
            dtype=dtype,
            skipped=skipped,
            non_finite=count,
            grad_norms=tuple(self.norm(staged.values, group) for group in range(self.groups)),
            ts=tuple(
                max(t for t, (_, _, of) in zip(self.t, self.ranges, strict=True) if of == group)
                for group in range(self.groups)
            ),
            numbers=numbers,
        )
        return self.last

    def norm(self, values: Vector, group: int) -> float:
        """Return the Euclidean norm of a group's gradient."""
        return float(np.sqrt(sum((values[start:end] ** 2).sum() for start, end, of in self.ranges if of == group)))

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
