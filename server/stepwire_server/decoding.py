"""From the contract's messages to the domain's records; everything a client can get wrong is caught here."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from stepwire.codecs import FLOAT32, dtype_from_wire
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam, Hyperparameters
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire.wire import formula_from_wire, overrides_from_wire, spec_from_wire
from stepwire_server.config import ServerConfig
from stepwire_server.features import refuse_unserved, unsupported
from stepwire_server.plan import NonFinitePolicy, SessionPlan, StepOrder

__all__ = ["decode_chunk_bytes", "decode_order", "decode_page_token", "decode_plan", "decode_request_id"]

MAX_GROUPS: Final = 1024
MAX_DIMENSIONS: Final = 16
MAX_NAME_CHARACTERS: Final = 512
MAX_LABEL_CHARACTERS: Final = 128
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAGE_TOKEN: Final = re.compile(r"(?:[0-9a-f]{32})?")
_ADAMW_WEIGHT_DECAY: Final = 1e-2
_POLICIES: Final = {
    optimizer_pb2.NON_FINITE_POLICY_UNSPECIFIED: NonFinitePolicy.REJECT,
    optimizer_pb2.NON_FINITE_POLICY_REJECT: NonFinitePolicy.REJECT,
    optimizer_pb2.NON_FINITE_POLICY_SKIP: NonFinitePolicy.SKIP,
    optimizer_pb2.NON_FINITE_POLICY_ALLOW: NonFinitePolicy.ALLOW,
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


def decode_plan(config: session_pb2.SessionConfig, limits: ServerConfig, device: str) -> SessionPlan:
    """Validate a session's config.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for what is not served.
    """
    refuse_unserved(config, device)
    group_messages = list(config.groups) or [optimizer_pb2.ParameterGroup()]
    if len(group_messages) > MAX_GROUPS:
        raise _invalid_config("config.groups", f"{len(group_messages)} groups; at most {MAX_GROUPS} are allowed")
    optimizer = _decode_optimizer(config.optimizer)
    base = optimizer.hyperparameters()
    return SessionPlan(
        layout=place(_decode_specs(config, limits.max_tensors, len(group_messages)), len(group_messages)),
        optimizer=optimizer,
        groups=tuple(
            base.replace(overrides_from_wire(group.overrides), f"config.groups[{index}].overrides")
            for index, group in enumerate(group_messages)
        ),
        non_finite=_POLICIES[config.gradient.non_finite],
        gradient_dtype=dtype_from_wire(config.gradient_dtype, FLOAT32, "config.gradient_dtype"),
        reply_dtype=dtype_from_wire(config.reply_dtype, FLOAT32, "config.reply_dtype"),
        start_at_zero=config.initialization == session_pb2.INITIALIZATION_ZEROS,
        lease_seconds=_decode_lease(config.lease_seconds, limits.max_lease_seconds),
        label=_decode_label(config.label),
    )


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
        reply_elements=chunk_bytes // reply_dtype.itemsize,
        groups=_decode_step_groups(begin, plan.groups),
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


def _decode_optimizer(message: optimizer_pb2.Optimizer) -> Adam:
    default = Adam()
    base = default.hyperparameters()
    if message.decoupled_weight_decay:
        base = base.replace({"weight_decay": _ADAMW_WEIGHT_DECAY})
    values = base.replace(overrides_from_wire(message.hyperparameters), "config.optimizer.hyperparameters")
    return Adam(
        lr=values.lr,
        betas=(values.beta1, values.beta2),
        eps=values.eps,
        weight_decay=values.weight_decay,
        maximize=values.maximize,
        amsgrad=message.amsgrad == optimizer_pb2.AMSGRAD_RAW,
        decoupled_weight_decay=message.decoupled_weight_decay,
        formula=formula_from_wire(message.formula),
    )


def _decode_step_groups(begin: step_pb2.StepBegin, groups: tuple[Hyperparameters, ...]) -> tuple[Hyperparameters, ...]:
    messages = begin.hyperparameters
    if not messages:
        return groups
    if len(messages) not in (1, len(groups)):
        raise _invalid_config("begin.hyperparameters", f"{len(messages)} entries; it must be 0, 1 or {len(groups)}")
    return tuple(
        group.replace(overrides_from_wire(messages[index % len(messages)]), f"begin.hyperparameters[{index}]")
        for index, group in enumerate(groups)
    )


def _refuse_unserved_step(begin: step_pb2.StepBegin) -> None:
    if begin.HasField("loss_scale"):
        raise unsupported("begin.loss_scale", "loss_scaling")
    if begin.missing_tensors:
        raise unsupported("begin.missing_tensors", "missing_gradients")
    if begin.HasField("weight"):
        raise unsupported("begin.weight", "aggregation")
    if begin.overlap:
        raise unsupported("begin.overlap", "overlap")
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
