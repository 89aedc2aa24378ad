"""The messages that operations become, some of them spoilt on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwire.v1 import optimizer_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from tests.server.model.model import DTYPES, INVALID_CONFIG, INVALID_FRAME, INVALID_TENSOR, Model, Status
from tests.server.model.operations import Begin, Load, Vector


def begin_message(model: Model, begin: Begin) -> step_pb2.StepBegin:
    message = step_pb2.StepBegin(
        step=model.step_number(begin),
        epoch=begin.epoch,
        gradient_dtype=begin.gradient_dtype,  # type: ignore[arg-type]
        reply=step_pb2.ReplyOptions(dtype=begin.reply_dtype, mode=begin.reply_mode),  # type: ignore[arg-type]
    )
    if (load := model.load_number(begin)) is not None:
        message.load = load
    if begin.lr is not None or begin.maximize is not None:
        message.hyperparameters.add(lr=begin.lr, maximize=begin.maximize)
    if begin.loss_scale is not None:
        message.loss_scale = begin.loss_scale
    if not (begin.fault == "overlap" and model.allows_overlap):
        spoil(message, begin.fault)
    return message


def chunk_message(offset: int, count: int, values: Vector, dtype: int, extra_bytes: int = 0) -> pb.AttachRequest:
    payload = values[min(offset, len(values)) :][:count].astype(DTYPES[dtype]).tobytes()
    return pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=offset, count=count), payload=resized(payload, extra_bytes))


def loaded_values(operation: Load, size: int) -> dict[str, Vector]:
    """Draw the values of a load, padding included, which the server must ignore; second moments are never negative."""
    generator = np.random.default_rng(operation.seed)
    values = {slot: generator.integers(-8, 9, size) / 8.0 for slot in dict.fromkeys(operation.slots)}
    return {slot: np.abs(value) if slot.endswith("_sq") else value for slot, value in values.items()}


def load_messages(
    session_id: str, operation: Load, values: dict[str, Vector], size: int
) -> tuple[list[Any], set[Status]]:
    """Make the messages after a load's opening, with one fault or none, and tell the refusals that they may lead to."""
    dtype = DTYPES.get(operation.dtype or 1)
    faults: set[Status] = set() if dtype is not None else {INVALID_CONFIG}
    cut = operation.cut % max(size, 1)
    messages: list[Any] = []
    for slot, value in values.items():
        for start, end in ((cut, size), (0, cut)):
            if start < end:
                payload = value[start:end].astype(dtype or np.float32).tobytes()
                messages.append(
                    pb.LoadRequest(slot=slot, chunk=tensor_pb2.Chunk(offset=start, count=end - start), payload=payload)
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
            faults.add(INVALID_FRAME)
        elif fault == "foreign slot":
            messages[0].slot = "velocity"
            faults.add(INVALID_CONFIG)
    if fault == "open":
        messages.append(pb.LoadRequest(open=state_pb2.LoadOpen(session_id=session_id)))
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
    elif fault == "gradient_dtype":
        message.gradient_dtype = 44  # type: ignore[assignment]
    elif fault == "reply_dtype":
        message.reply.dtype = 44  # type: ignore[assignment]
    elif fault == "reply_chunk_bytes":
        message.reply.chunk_bytes = 7
    elif fault == "loss_scale":
        message.loss_scale = 0.0
    elif fault == "missing_tensors":
        message.missing_tensors.append(0)
    elif fault == "weight":
        message.weight = 1.0
    elif fault == "base_step":
        message.base_step = 0
    elif fault == "traceparent":
        message.traceparent = "00-1-2-01"
    elif fault == "overlap":
        message.overlap = True
    elif fault == "patches":
        message.reply.mode = step_pb2.REPLY_MODE_CHANGED
    elif fault == "reply_mode":
        message.reply.mode = 44  # type: ignore[assignment]
