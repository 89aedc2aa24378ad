"""From the contract's messages to the domain's records; everything a client can get wrong is caught here."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

from stepwire.errors import InvalidRequestError, Reason, UnsupportedFeatureError
from stepwire.layout import TensorSpec, place
from stepwire.optimizers.aggregation import aggregation_from_wire
from stepwire.optimizers.durability import Durability, durability_from_wire
from stepwire.optimizers.gradient_treatment import treatment_from_wire
from stepwire.optimizers.schedules import schedule_from_wire
from stepwire.v1 import optimizer_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32, dtype_from_wire
from stepwire.wire.messages import (
    PRECISIONS,
    optimizer_from_wire,
    overrides_from_wire,
    precision_from_wire,
    seconds_from_wire,
    specs_from_wire,
)
from stepwire_server.config import ServerConfig
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rpc.decode_tables import check_table, check_tables
from stepwire_server.rpc.features import refuse_unserved
from stepwire_server.rules import EIGHT_BIT_SLOTS, FLOAT32_SLOTS, Precision

__all__ = ["decode_fork_config", "decode_page_token", "decode_request_id", "decode_session_config"]

MAX_GROUPS: Final = 1024
MAX_DIMENSIONS: Final = 16
MAX_NAME_CHARACTERS: Final = 512
MAX_LABEL_CHARACTERS: Final = 128
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAGE_TOKEN: Final = re.compile(r"(?:[0-9a-f]{32})?")

# A text is shown in errors and listings. The rest of Unicode is the user's: joiners make emoji and words of Persian.
_CONTROLS: Final = ("Cc", "Cs", "Zl", "Zp")
_DIRECTIONS: Final = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def decode_request_id(request_id: str) -> str:
    """Check a request id.

    Raises:
        InvalidRequestError: it is empty, too long, or holds other characters.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError.of("request_id", f"{request_id[:80]!r} is not 1 to 64 characters of [A-Za-z0-9._-]")
    return request_id


def decode_page_token(token: str) -> str:
    """Check a page token, which is the id of the last session on the page before.

    Raises:
        InvalidRequestError: no page gave it.
    """
    if not _PAGE_TOKEN.fullmatch(token):
        raise InvalidRequestError.of("page_token", f"{token[:80]!r} is not the `next_page_token` of a page")
    return token


def decode_session_config(message: session_pb2.SessionConfig, limits: ServerConfig) -> SessionConfig:
    """Validate a session's config.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for what is not served.
    """
    refuse_unserved(message)
    group_messages = list(message.groups) or [optimizer_pb2.ParameterGroup()]
    if len(group_messages) > MAX_GROUPS:
        raise InvalidRequestError.of("config.groups", f"{len(group_messages)} groups; at most {MAX_GROUPS} are allowed")
    optimizer = optimizer_from_wire(message.optimizer, "config.optimizer")
    base = optimizer.hyperparameters()
    specs = _decode_specs(message, limits.max_tensors, len(group_messages))
    clips = tuple(_decode_clip(group, f"config.groups[{index}]") for index, group in enumerate(group_messages))
    config = SessionConfig(
        layout=place(specs, len(group_messages)),
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
        treatment=treatment_from_wire(message.gradient, "config.gradient", group_clips=any(clips)),
        precision=Precision(precision_from_wire(message.state_precision)),
        group_precisions=tuple(
            Precision(precision_from_wire(group.state_precision, message.state_precision)) for group in group_messages
        ),
        measures=message.telemetry in (session_pb2.TELEMETRY_LEVEL_UNSPECIFIED, session_pb2.TELEMETRY_LEVEL_FULL),
        gradient_dtype=dtype_from_wire(message.gradient_dtype, FLOAT32, "config.gradient_dtype", gradients=True),
        reply_dtype=dtype_from_wire(message.reply_dtype, FLOAT32, "config.reply_dtype"),
        start_at_zero=message.initialization == session_pb2.INITIALIZATION_ZEROS,
        lease_seconds=_decode_lease(message, limits.max_lease_seconds),
        label=_decode_label(message.label),
        device=message.device,
        tells_norms=message.telemetry != session_pb2.TELEMETRY_LEVEL_NONE,
        durability=_decode_durability(message, limits),
        aggregation=aggregation_from_wire(message.aggregation, "config.aggregation"),
    )
    return _checked(config, message)


def _checked(config: SessionConfig, message: session_pb2.SessionConfig) -> SessionConfig:
    """Check what options ask of each other."""
    _check_precision(config, message)
    check_tables(config)
    if config.aggregation is None:
        return config
    if config.treatment.two_phase and config.aggregation.required < config.aggregation.workers:
        raise InvalidRequestError.of(
            "config.aggregation.required_workers",
            "with `two_phase` a round is decided by all workers: a late one would wait for a decision of others; leave "
            "one of them out",
        )
    if config.aggregation.is_robust and config.treatment.policy != "reject":
        raise InvalidRequestError.of(
            "config.aggregation.reduction",
            f"{config.aggregation.reduction!r} has an order for finite numbers alone; use the policy 'reject' for NaN "
            "and Inf",
        )
    return config


def decode_fork_config(request: pb.ForkSessionRequest, config: SessionConfig, limits: ServerConfig) -> SessionConfig:
    """Return the config of a fork: that of its session, but for what the request says of its life.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: the server has no data directory.
    """
    own = session_pb2.SessionConfig(label=request.label, durability=request.durability)
    if request.HasField("lease"):
        own.lease.CopyFrom(request.lease)
    if request.HasField("checkpoints"):
        own.checkpoints.CopyFrom(request.checkpoints)
    refuse_unserved(own)
    durability = _decode_durability(own, limits)
    return dataclasses.replace(
        config,
        label=_decode_label(request.label) if request.HasField("label") else config.label,
        device=request.device if request.HasField("device") else config.device,
        lease_seconds=_decode_lease(own, limits.max_lease_seconds) if own.HasField("lease") else config.lease_seconds,
        durability=durability if request.durability else config.durability,
    )


def _decode_specs(message: session_pb2.SessionConfig, max_tensors: int, group_count: int) -> list[TensorSpec]:
    if not 1 <= len(message.tensors) <= max_tensors:
        raise _invalid_tensor("config.tensors", f"{len(message.tensors)} tensors; it must be 1 to {max_tensors}")
    names: set[str] = set()
    for index, tensor in enumerate(message.tensors):
        field = f"config.tensors[{index}]"
        name = tensor.name
        if problem := _text_problem(name, MAX_NAME_CHARACTERS):
            raise _invalid_tensor(f"{field}.name", problem)
        if not name or name in names:
            raise _invalid_tensor(f"{field}.name", f"{name!r} is {'used twice' if name else 'empty'}")
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise _invalid_tensor(f"{field}.shape", f"{len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS}")
        if tensor.group >= group_count:
            raise _invalid_tensor(f"{field}.group", f"{tensor.group}; there are {group_count} groups")
        names.add(name)
        if tensor.HasField("table"):
            check_table(tensor, field)
    return specs_from_wire(message)


def _check_precision(config: SessionConfig, message: session_pb2.SessionConfig) -> None:
    precise = [slot for slot in config.rule.slots if slot in FLOAT32_SLOTS]
    if precise and (field := _first_in(message, "bfloat16", "int8")) is not None:
        raise InvalidRequestError.of(
            f"{field}.state_precision",
            f"the optimizer subtracts the square of {', '.join(precise)} from a mean square, and rounding alone may "
            "remain where moments have few bits; use float32 moments, or leave out `centered`",
        )
    coarse = [slot for slot in config.rule.slots if slot not in EIGHT_BIT_SLOTS]
    if coarse and (field := _first_in(message, "int8")) is not None:
        raise InvalidRequestError.of(
            f"{field}.state_precision",
            f"8-bit moments: this optimizer keeps {', '.join(coarse)}, which 8 bits do not hold well enough; use "
            "float32 or bfloat16 moments",
        )


def _first_in(message: session_pb2.SessionConfig, *names: str) -> str | None:
    """Return the first field that asks for one of some precisions: the session, a group or a tensor."""
    precisions = [PRECISIONS[name] for name in names]
    if message.state_precision in precisions:
        return "config"
    owners: tuple[tuple[str, Sequence[Any]], ...] = (("groups", message.groups), ("tensors", message.tensors))
    for name, members in owners:
        for index, member in enumerate(members):
            if member.state_precision in precisions:
                return f"config.{name}[{index}]"
    return None


def _decode_clip(group: optimizer_pb2.ParameterGroup, field: str) -> float | None:
    if not group.HasField("clip_grad_norm"):
        return None
    if not 0.0 < group.clip_grad_norm < math.inf:
        raise InvalidRequestError.of(f"{field}.clip_grad_norm", f"{group.clip_grad_norm!r}; it must be finite and > 0")
    return group.clip_grad_norm


def _decode_durability(message: session_pb2.SessionConfig, limits: ServerConfig) -> Durability:
    durability = durability_from_wire(message, "config")
    if durability.level == "replicated" and not (limits.standby or limits.standby_of):
        raise UnsupportedFeatureError(
            "config.durability asks for 'replicated', and this server accepts no standby; start it with --standby "
            "required, or create the session with another durability",
            metadata={"field": "config.durability", "feature": "durability_replicated"},
        )
    if durability.on_disk and not limits.data_dir:
        feature = f"durability_{durability.level}"
        raise UnsupportedFeatureError(
            f"config.durability asks for {durability.level!r}, and this server keeps sessions in memory alone; start "
            "it with --data-dir, or create the session with durability 'memory'",
            metadata={"field": "config.durability", "feature": feature},
        )
    return durability


def _decode_lease(message: session_pb2.SessionConfig, most: float) -> float:
    if not message.HasField("lease"):
        return most
    seconds = seconds_from_wire(message.lease)
    if not 0 < seconds <= most:
        raise InvalidRequestError.of("config.lease", f"{seconds} s; it must be above 0 and at most {most} s")
    return seconds


def _decode_label(label: str) -> str:
    if problem := _text_problem(label, MAX_LABEL_CHARACTERS):
        raise InvalidRequestError.of("config.label", problem)
    return label


def _text_problem(text: str, most: int) -> str | None:
    if len(text) > most:
        return f"{len(text)} characters; at most {most}"
    for character in "" if text.isprintable() else text:
        if unicodedata.category(character) in _CONTROLS or unicodedata.bidirectional(character) in _DIRECTIONS:
            return (
                f"{text[:80]!r} has the character U+{ord(character):04X}, which controls a terminal or the direction "
                "of its lines; leave it out"
            )
    return None


def _invalid_tensor(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", reason=Reason.INVALID_TENSOR, metadata={"field": field})
