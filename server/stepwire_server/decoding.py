"""From the contract's messages to the domain's records; everything a client can get wrong is caught here."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final

from stepwire.codecs import FLOAT32, dtype_from_wire
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Hyperparameters
from stepwire.schedules import schedule_from_wire
from stepwire.treatment import check_scale, treatment_from_wire
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire.wire import optimizer_from_wire, overrides_from_wire, spec_from_wire
from stepwire_server.config import ServerConfig
from stepwire_server.features import refuse_unserved, unsupported
from stepwire_server.plan import SessionPlan, StepOrder
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["decode_chunk_bytes", "decode_order", "decode_page_token", "decode_plan", "decode_request_id"]

MAX_GROUPS: Final = 1024
MAX_DIMENSIONS: Final = 16
MAX_NAME_CHARACTERS: Final = 512
MAX_LABEL_CHARACTERS: Final = 128
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAGE_TOKEN: Final = re.compile(r"(?:[0-9a-f]{32})?")
_PRECISIONS: Final = {
    session_pb2.STATE_PRECISION_UNSPECIFIED: Precision.FLOAT32,
    session_pb2.STATE_PRECISION_FLOAT32: Precision.FLOAT32,
    session_pb2.STATE_PRECISION_BFLOAT16_MOMENTS: Precision.BFLOAT16,
    session_pb2.STATE_PRECISION_INT8_MOMENTS: Precision.INT8,
}


def decode_request_id(request_id: str) -> str:
    """Check a request id.

    Raises:
        InvalidRequestError: it is empty, too long, or holds other characters.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        raise _invalid_config("request_id", f"{request_id[:80]!r} is not 1 to 64 characters of [A-Za-z0-9._-]")
    return request_id


def decode_page_token(token: str) -> str:
    """Check a page token, which is the id of the last session on the page before.

    Raises:
        InvalidRequestError: no page gave it.
    """
    if not _PAGE_TOKEN.fullmatch(token):
        raise _invalid_config("page_token", f"{token[:80]!r} is not the `next_page_token` of a page")
    return token


def decode_plan(config: session_pb2.SessionConfig, limits: ServerConfig) -> SessionPlan:
    """Validate a session's config.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for what is not served.
    """
    refuse_unserved(config)
    group_messages = list(config.groups) or [optimizer_pb2.ParameterGroup()]
    if len(group_messages) > MAX_GROUPS:
        raise _invalid_config("config.groups", f"{len(group_messages)} groups; at most {MAX_GROUPS} are allowed")
    optimizer = optimizer_from_wire(config.optimizer, "config.optimizer")
    base, precision = optimizer.hyperparameters(), _PRECISIONS[config.state_precision]
    specs = _decode_specs(config, limits.max_tensors, len(group_messages))
    clips = tuple(_decode_clip(group, f"config.groups[{index}]") for index, group in enumerate(group_messages))
    plan = SessionPlan(
        layout=place(specs, len(group_messages), in_blocks=precision is Precision.INT8),
        optimizer=optimizer,
        groups=tuple(
            optimizer.override(base, overrides_from_wire(group.overrides), f"config.groups[{index}].overrides")
            for index, group in enumerate(group_messages)
        ),
        schedules=tuple(
            schedule_from_wire(group.schedule, f"config.groups[{index}].schedule")
            if group.HasField("schedule")
            else None
            for index, group in enumerate(group_messages)
        ),
        group_clips=clips,
        treatment=treatment_from_wire(config.gradient, "config.gradient", group_clips=any(clips)),
        precision=precision,
        measures=config.telemetry != session_pb2.TELEMETRY_LEVEL_GRADIENT,
        gradient_dtype=dtype_from_wire(config.gradient_dtype, FLOAT32, "config.gradient_dtype"),
        reply_dtype=dtype_from_wire(config.reply_dtype, FLOAT32, "config.reply_dtype"),
        start_at_zero=config.initialization == session_pb2.INITIALIZATION_ZEROS,
        lease_seconds=_decode_lease(config.lease_seconds, limits.max_lease_seconds),
        label=_decode_label(config.label),
        device=config.device,
    )
    _check_precision(plan)
    return plan


def decode_order(begin: step_pb2.StepBegin, plan: SessionPlan, max_chunk_bytes: int) -> StepOrder:
    """Validate what opens a step.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for what is not served.
    """
    _refuse_unserved_step(begin)
    reply_dtype = dtype_from_wire(begin.reply_dtype, plan.reply_dtype, "begin.reply_dtype")
    chunk_bytes = decode_chunk_bytes(begin.reply_chunk_bytes, max_chunk_bytes, "begin.reply_chunk_bytes")
    return StepOrder(
        step=begin.step,
        epoch=begin.epoch,
        gradient_dtype=dtype_from_wire(begin.gradient_dtype, plan.gradient_dtype, "begin.gradient_dtype"),
        reply_dtype=reply_dtype,
        reply=begin.reply_mode != step_pb2.REPLY_MODE_NONE,
        reply_elements=chunk_bytes // reply_dtype.itemsize // plan.layout.chunk_alignment * plan.layout.chunk_alignment,
        groups=_decode_step_groups(begin, plan),
        own_lr=_decode_own_lr(begin, len(plan.groups)),
        loss_scale=_decode_loss_scale(begin, plan),
        missing=_decode_missing(begin, plan),
    )


def decode_chunk_bytes(asked: int, most: int, field: str) -> int:
    """Return the size of an answer's chunks: what was asked, or the limit.

    Raises:
        InvalidRequestError: below 4096 or above the limit.
    """
    if asked == 0:
        return most
    if not 4096 <= asked <= most:
        raise _invalid_config(field, f"{asked} bytes; it must be in [4096, {most}], or 0 for the most")
    return asked


def _decode_specs(config: session_pb2.SessionConfig, max_tensors: int, group_count: int) -> list[TensorSpec]:
    if not 1 <= len(config.tensors) <= max_tensors:
        raise _invalid_tensor("config.tensors", f"{len(config.tensors)} tensors; it must be 1 to {max_tensors}")
    specs: list[TensorSpec] = []
    names: set[str] = set()
    for index, message in enumerate(config.tensors):
        field = f"config.tensors[{index}]"
        name = message.name
        if problem := _text_problem(name, MAX_NAME_CHARACTERS):
            raise _invalid_tensor(f"{field}.name", problem)
        if not name or name in names:
            raise _invalid_tensor(f"{field}.name", f"{name!r} is {'used twice' if name else 'empty'}")
        if len(message.shape) > MAX_DIMENSIONS:
            raise _invalid_tensor(f"{field}.shape", f"{len(message.shape)} dimensions; at most {MAX_DIMENSIONS}")
        if message.group >= group_count:
            raise _invalid_tensor(f"{field}.group", f"{message.group}; there are {group_count} groups")
        names.add(name)
        specs.append(spec_from_wire(message))
    return specs


def _check_precision(plan: SessionPlan) -> None:
    coarse = [slot for slot in plan.rule.slots if slot not in EIGHT_BIT_SLOTS]
    if plan.precision is Precision.INT8 and coarse:
        raise _invalid_config(
            "config.state_precision",
            f"8-bit moments: this optimizer keeps {', '.join(coarse)}, which 8 bits do not hold well enough; use "
            "float32 or bfloat16 moments",
        )


def _decode_clip(group: optimizer_pb2.ParameterGroup, field: str) -> float | None:
    if not group.HasField("clip_grad_norm"):
        return None
    if not 0.0 < group.clip_grad_norm < math.inf:
        raise _invalid_config(f"{field}.clip_grad_norm", f"{group.clip_grad_norm!r}; it must be finite and > 0")
    return group.clip_grad_norm


def _decode_step_groups(begin: step_pb2.StepBegin, plan: SessionPlan) -> tuple[Hyperparameters, ...]:
    messages, groups = begin.hyperparameters, plan.groups
    if not messages:
        return groups
    if len(messages) not in (1, len(groups)):
        raise _invalid_config("begin.hyperparameters", f"{len(messages)} entries; it must be 0, 1 or {len(groups)}")
    decoded = []
    for index, group in enumerate(groups):
        field = f"begin.hyperparameters[{index}]"
        values = plan.optimizer.override(group, overrides_from_wire(messages[index % len(messages)]), field)
        if values.momentum and not plan.momentum:
            raise _invalid_config(
                f"{field}.momentum",
                f"{values.momentum!r}; the session keeps no momentum buffer, because no group had momentum when it was "
                "created",
            )
        decoded.append(values)
    return tuple(decoded)


def _decode_own_lr(begin: step_pb2.StepBegin, count: int) -> tuple[bool, ...]:
    messages = begin.hyperparameters
    return tuple(bool(messages) and messages[index % len(messages)].HasField("lr") for index in range(count))


def _decode_loss_scale(begin: step_pb2.StepBegin, plan: SessionPlan) -> float:
    if not begin.HasField("loss_scale"):
        return 1.0
    if plan.treatment.loss_scaling is not None:
        raise _invalid_config("begin.loss_scale", "the session scales by itself; leave it out")
    check_scale(begin.loss_scale, "begin.loss_scale")
    return begin.loss_scale


def _decode_missing(begin: step_pb2.StepBegin, plan: SessionPlan) -> frozenset[int]:
    missing = begin.missing_tensors
    if not missing:
        return frozenset()
    field, count = "begin.missing_tensors", len(plan.layout.tensors)
    if plan.treatment.missing_gradient != "keep":
        raise _invalid_config(field, "tensors are left out; the session was created with missing_gradient 'reject'")
    if any(low >= high for low, high in zip(missing, missing[1:], strict=False)) or missing[-1] >= count:
        raise _invalid_config(field, f"indices must rise and be below {count}, the number of tensors")
    return frozenset(missing)


def _refuse_unserved_step(begin: step_pb2.StepBegin) -> None:
    if begin.HasField("weight"):
        raise unsupported("begin.weight", "aggregation")
    if begin.overlap:
        raise unsupported("begin.overlap", "overlap")
    if begin.in_shared_memory:
        raise unsupported("begin.in_shared_memory", "transport_shm")
    if begin.reply_first:
        raise unsupported("begin.reply_first", "reply_order")
    if begin.reply_mode not in (0, step_pb2.REPLY_MODE_PARAMETERS, step_pb2.REPLY_MODE_NONE):
        raise unsupported("begin.reply_mode", "reply_patches")


def _decode_lease(seconds: float, most: float) -> float:
    if seconds == 0:
        return most
    if not 0 < seconds <= most:
        raise _invalid_config("config.lease_seconds", f"{seconds}; it must be in (0, {most}], or 0 for the most")
    return seconds


def _decode_label(label: str) -> str:
    if problem := _text_problem(label, MAX_LABEL_CHARACTERS):
        raise _invalid_config("config.label", problem)
    return label


def _text_problem(text: str, most: int) -> str | None:
    if len(text) > most:
        return f"{len(text)} characters; at most {most}"
    if any(unicodedata.category(character).startswith("C") for character in text):
        return f"{text[:80]!r} holds control characters"
    return None


def _invalid_config(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", reason=Reason.INVALID_CONFIG, metadata={"field": field})


def _invalid_tensor(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", reason=Reason.INVALID_TENSOR, metadata={"field": field})
