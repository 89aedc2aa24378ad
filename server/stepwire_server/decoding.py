"""From the contract's messages to the domain's records; everything a client can get wrong is caught here."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final

from stepwire.codecs import FLOAT32, dtype_from_wire
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.schedules import schedule_from_wire
from stepwire.treatment import treatment_from_wire
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.wire import optimizer_from_wire, overrides_from_wire, spec_from_wire
from stepwire_server.config import ServerConfig
from stepwire_server.features import refuse_unserved
from stepwire_server.plan import SessionPlan
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["decode_page_token", "decode_plan", "decode_request_id"]

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
        measures=config.telemetry in (session_pb2.TELEMETRY_LEVEL_UNSPECIFIED, session_pb2.TELEMETRY_LEVEL_FULL),
        gradient_dtype=dtype_from_wire(config.gradient_dtype, FLOAT32, "config.gradient_dtype", gradients=True),
        reply_dtype=dtype_from_wire(config.reply_dtype, FLOAT32, "config.reply_dtype"),
        start_at_zero=config.initialization == session_pb2.INITIALIZATION_ZEROS,
        lease_seconds=_decode_lease(config.lease_seconds, limits.max_lease_seconds),
        label=_decode_label(config.label),
        device=config.device,
        tells_norms=config.telemetry != session_pb2.TELEMETRY_LEVEL_NONE,
    )
    _check_precision(plan)
    return plan


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
