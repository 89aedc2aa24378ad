"""From the contract's messages of a step to the domain's order of it."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.aggregation import LEAST_WEIGHT, MOST_WEIGHT
from stepwire.optimizers.gradient_treatment import check_scale
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import BFLOAT16, dtype_from_wire, dtype_to_wire
from stepwire.wire.messages import overrides_from_wire
from stepwire.wire.trace_context import TraceContext
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.rpc.decode_tables import check_table_groups, decode_table_entries
from stepwire_server.rpc.features import unsupported

__all__ = [
    "DEFAULT_REPLY_BYTES",
    "decode_chunk_bytes",
    "decode_decision",
    "decode_step_request",
    "decode_trace",
    "with_base_step",
]

# The fields of an opening that do not decide what its step does to the state.
_OF_THE_MOMENT: Final = (
    "step",
    "epoch",
    "load",
    "base_step",
    "weight",
    "reply",
    "in_shared_memory",
    "traceparent",
    "await_admission",
)

# Of patches for a client that holds nothing: no step has this base, so all parameters go back.
_NO_STEP: Final = -1

DEFAULT_REPLY_BYTES: Final = (4 << 20) - (64 << 10)
"""The payload of a message to a client that names no size. gRPC clients receive 4 MiB, headers included, by default."""


def decode_step_request(begin: step_pb2.StepBegin, config: SessionConfig, max_chunk_bytes: int) -> StepRequest:
    """Validate what opens a step.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for what is not served.
    """
    _refuse_unserved_step(begin)
    tables = decode_table_entries(begin, config)
    reply_dtype = dtype_from_wire(begin.reply.dtype, config.reply_dtype, "begin.reply.dtype")
    chunk_bytes = decode_chunk_bytes(begin.reply.chunk_bytes, max_chunk_bytes, "begin.reply.chunk_bytes")
    request = StepRequest(
        step=begin.step,
        epoch=begin.epoch,
        load=begin.load if begin.HasField("load") else None,
        gradient_dtype=dtype_from_wire(
            begin.gradient_dtype, config.gradient_dtype, "begin.gradient_dtype", gradients=True
        ),
        reply_dtype=reply_dtype,
        reply=begin.reply.mode != step_pb2.REPLY_MODE_NONE,
        reply_elements=chunk_bytes
        // reply_dtype.itemsize
        // config.layout.chunk_alignment
        * config.layout.chunk_alignment,
        groups=_decode_step_groups(begin, config),
        own_lr=_decode_own_lr(begin, len(config.groups)),
        loss_scale=_decode_loss_scale(begin, config),
        missing=_decode_missing(begin, config),
        reply_first=_decode_reply_first(begin, config),
        reply_base=_decode_reply_base(begin, reply_dtype),
        overlap=_decode_overlap(begin, config),
        shared=_decode_shared(begin, config),
        weight=_decode_weight(begin, config),
        awaits_admission=begin.await_admission,
        tables=tables,
        reply_rows=bool(config.tables) and not begin.reply.omit_rows,
        opening=_opening(begin) if config.durability.logged else b"",
    )
    return with_base_step(request, begin.base_step, config) if begin.HasField("base_step") else request


def decode_trace(begin: step_pb2.StepBegin) -> TraceContext | None:
    """Cut the client's place in a trace out of an opening: the rest is alike from step to step.

    Raises:
        InvalidRequestError: it is no W3C trace context.
    """
    if not (text := begin.traceparent):
        return None
    begin.ClearField("traceparent")
    return TraceContext.parse(text, "begin.traceparent")


def with_base_step(request: StepRequest, base_step: int, config: SessionConfig) -> StepRequest:
    """Return a request whose gradient is of the parameters of a step.

    Raises:
        InvalidRequestError: the session has one worker.
    """
    if config.aggregation is None:
        raise InvalidRequestError.of("begin.base_step", "the session has one worker; leave it out")
    return request._replace(base_step=base_step)


def _opening(begin: step_pb2.StepBegin) -> bytes:
    """Return the part of an opening that decides what the step does to the state."""
    kept = step_pb2.StepBegin()
    kept.CopyFrom(begin)
    for field in _OF_THE_MOMENT:
        kept.ClearField(field)
    return kept.SerializeToString()


def decode_decision(commit: step_pb2.StepCommit, config: SessionConfig) -> Decision | None:
    """Return what a commit brings from the coordinator of a cut gradient; None where it brings nothing.

    Raises:
        InvalidRequestError: the session has no coordinator, or a factor is none.
    """
    if not commit.ByteSize():  # as almost always
        return None
    if not (commit.skip or commit.HasField("clip_coefficient") or commit.group_coefficients):
        return None
    if not config.treatment.two_phase:
        raise InvalidRequestError.of(
            "commit.clip_coefficient", "the session decides by itself; create it with `two_phase` or leave this out"
        )
    factors, count = tuple(commit.group_coefficients), len(config.groups)
    if len(factors) not in (0, count):
        raise InvalidRequestError.of("commit.group_coefficients", f"{len(factors)} factors; it must be 0 or {count}")
    coefficient = commit.clip_coefficient if commit.HasField("clip_coefficient") else 1.0
    for field, value in [("clip_coefficient", coefficient), *(("group_coefficients", value) for value in factors)]:
        # A norm that is NaN makes a factor that is, and where NaN is to be applied, so is the factor.
        applies_nan = config.treatment.policy == "allow" and math.isnan(value)
        if not (0.0 <= value <= 1.0 or applies_nan):
            raise InvalidRequestError.of(f"commit.{field}", f"{value!r}; a factor of clipping is in [0, 1]")
    return Decision(coefficient, factors, commit.skip)


def decode_chunk_bytes(asked: int, most: int, field: str) -> int:
    """Return the size of the chunks that go back: as asked, or the default.

    Raises:
        InvalidRequestError: below 4096 or above the limit.
    """
    if asked == 0:
        return min(most, DEFAULT_REPLY_BYTES)
    if not 4096 <= asked <= most:
        raise InvalidRequestError.of(field, f"{asked} bytes; it must be in [4096, {most}], or 0 for the default")
    return asked


def _decode_step_groups(begin: step_pb2.StepBegin, config: SessionConfig) -> tuple[Hyperparameters, ...]:
    messages, groups = begin.hyperparameters, config.groups
    if not messages:
        return groups
    if len(messages) not in (1, len(groups)):
        raise InvalidRequestError.of(
            "begin.hyperparameters", f"{len(messages)} entries; it must be 0, 1 or {len(groups)}"
        )
    decoded = []
    for index, group in enumerate(groups):
        field = f"begin.hyperparameters[{index}]"
        values = config.optimizer.override(group, overrides_from_wire(messages[index % len(messages)]), field)
        if values.momentum and not config.momentum:
            raise InvalidRequestError.of(
                f"{field}.momentum",
                f"{values.momentum!r}; the session keeps no momentum buffer, because no group had momentum when it was "
                "created",
            )
        decoded.append(values)
    check_table_groups(config, decoded, "begin.hyperparameters")
    return tuple(decoded)


def _decode_own_lr(begin: step_pb2.StepBegin, count: int) -> tuple[bool, ...]:
    messages = begin.hyperparameters
    return tuple(bool(messages) and messages[index % len(messages)].HasField("lr") for index in range(count))


def _decode_loss_scale(begin: step_pb2.StepBegin, config: SessionConfig) -> float:
    if not begin.HasField("loss_scale"):
        return 1.0
    if config.treatment.loss_scaling is not None:
        raise InvalidRequestError.of("begin.loss_scale", "the session scales by itself; leave it out")
    check_scale(begin.loss_scale, "begin.loss_scale")
    return begin.loss_scale


def _decode_missing(begin: step_pb2.StepBegin, config: SessionConfig) -> frozenset[int]:
    missing = begin.missing_tensors
    if not missing:
        return frozenset()
    field, count = "begin.missing_tensors", len(config.layout.tensors)
    if config.treatment.missing_gradient != "keep":
        raise InvalidRequestError.of(
            field, "tensors are left out; the session was created with missing_gradient 'reject'"
        )
    if any(low >= high for low, high in zip(missing, missing[1:], strict=False)) or missing[-1] >= count:
        raise InvalidRequestError.of(field, f"indices must rise and be below {count}, the number of tensors")
    return frozenset(missing)


def _decode_reply_first(begin: step_pb2.StepBegin, config: SessionConfig) -> tuple[int, ...]:
    first, count = tuple(begin.reply.first), len(config.layout.tensors)
    if len(set(first)) != len(first) or any(index >= count for index in first):
        raise InvalidRequestError.of(
            "begin.reply.first", f"indices must differ and be below {count}, the number of tensors: {first[:8]}"
        )
    return first


def _decode_reply_base(begin: step_pb2.StepBegin, reply_dtype: np.dtype[Any]) -> int | None:
    if begin.reply.mode != step_pb2.REPLY_MODE_CHANGED:
        return None
    if reply_dtype != BFLOAT16:
        raise InvalidRequestError.of(
            "begin.reply.mode", f"patches are of bfloat16 parameters, and the reply's dtype is {reply_dtype.name}"
        )
    return begin.reply.base if begin.reply.HasField("base") else _NO_STEP


def _decode_weight(begin: step_pb2.StepBegin, config: SessionConfig) -> float:
    if not begin.HasField("weight"):
        return 1.0
    if config.aggregation is None or config.aggregation.reduction != "weighted_mean":
        raise InvalidRequestError.of("begin.weight", "weights are for the reduction 'weighted_mean'; leave it out")
    if not LEAST_WEIGHT <= begin.weight <= MOST_WEIGHT:
        raise InvalidRequestError.of("begin.weight", f"{begin.weight!r} is not in [{LEAST_WEIGHT:g}, {MOST_WEIGHT:g}]")
    return begin.weight


def _decode_overlap(begin: step_pb2.StepBegin, config: SessionConfig) -> bool:
    """Refuse what needs the whole gradient before its first element is applied."""
    if not begin.overlap:
        return False
    treatment = config.treatment
    obstacles = {
        "aggregation": config.aggregation is not None,
        "clip_grad_norm": treatment.clip_grad_norm is not None or any(config.group_clips),
        f"the policy {treatment.policy!r} for NaN and Inf (it would have to be 'allow')": treatment.policy != "allow",
        "accumulation_steps": treatment.accumulation_steps > 1,
        f"the layerwise rule {config.optimizer.rule!r}": config.rule.direction is not None,
        "two_phase": treatment.two_phase,
        "reply.mode REPLY_MODE_CHANGED": begin.reply.mode == step_pb2.REPLY_MODE_CHANGED,
    }
    for obstacle, asked in obstacles.items():
        if asked:
            raise InvalidRequestError.of(
                "begin.overlap",
                f"chunks cannot be applied as they arrive: {obstacle} needs the whole gradient first. Step without "
                "overlap, or create the session without it",
            )
    return True


def _decode_shared(begin: step_pb2.StepBegin, config: SessionConfig) -> bool:
    """Refuse what does not lie in the memory that a session shares."""
    if not begin.in_shared_memory:
        return False
    obstacles = {
        "gradient_dtype": begin.gradient_dtype not in (0, dtype_to_wire(config.gradient_dtype)),
        "reply.dtype": begin.reply.dtype not in (0, dtype_to_wire(config.reply_dtype)),
        "overlap": begin.overlap,
        "reply.mode": begin.reply.mode == step_pb2.REPLY_MODE_CHANGED,
    }
    for field, asked in obstacles.items():
        if asked:
            raise InvalidRequestError.of(
                f"begin.{field}",
                "a step in shared memory takes the session's own dtypes, without overlap and patches; leave it out, or "
                "send the step in messages",
            )
    return True


def _refuse_unserved_step(begin: step_pb2.StepBegin) -> None:
    if begin.reply.mode not in step_pb2.ReplyMode.values():
        raise unsupported("begin.reply.mode", "reply_patches")
