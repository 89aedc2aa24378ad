"""State in and out of a session: pulls as of one step, loads all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stepwire.errors import InvalidRequestError
from stepwire.layout import SCALE_SUFFIX
from stepwire.optimizers.gradient_treatment import check_scale
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, tensor_pb2
from stepwire.wire.dtypes import FLOAT32, dtype_from_wire
from stepwire.wire.frames import Frame, FrameBuffer
from stepwire_server.engines.protocol import PARAM, HostArray, Table
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.rpc.attach import check_chunk, invalid_frame
from stepwire_server.rpc.decode_step import decode_chunk_bytes
from stepwire_server.rpc.decode_tables import check_load, check_whole, decode_id_tables, decode_load_tables, decode_rows
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.load import Load
from stepwire_server.sessions.row_load import RowLoad
from stepwire_server.sessions.session import Session
from stepwire_server.steps.row_gradients import NamedRows, table_of

__all__ = ["load", "pull"]

_COUNTER_END = 2**53
_INDEX_ELEMENTS = 4
_INDEX_BYTES = 10
_ID_BYTES = 8


def pull(session: Session, request: pb.PullRequest, max_chunk_bytes: int) -> Iterator[bytes]:
    """Yield the messages of a pull.

    Raises:
        InvalidRequestError: an unknown slot or encoding.
        StateChangedError: a step or a load was committed meanwhile.
        StepwireError: as `Session.snapshot`.
    """
    slots = _known_slots(session, list(request.slots) or [PARAM], "slots")
    dtype = dtype_from_wire(request.dtype, FLOAT32, "dtype")
    most = decode_chunk_bytes(request.chunk_bytes, max_chunk_bytes, "chunk_bytes") // dtype.itemsize
    at_once = session.config.aggregation is not None and slots == (PARAM,)
    if tables := decode_id_tables(request, session.config):
        with session.calls.one():
            yield from _pull_ids(session, tables, most * dtype.itemsize // _ID_BYTES)
        return
    if request.rows:
        asked = _asked_rows(session, request, most)
        with session.calls.one():
            yield from (_pull_rows_at_once if at_once else _pull_rows)(session, slots, asked, dtype)
        return
    if at_once:
        with session.calls.one():
            yield from _pull_at_once(session, dtype, most)
        return
    check_whole(session.config, "slots")
    with session.calls.one():  # a reader may take its time
        snapshot = session.exchange.snapshot()
        yield _header(snapshot, session.ledger.epoch).SerializeToString()
        for slot, offset in itertools.product(slots, range(0, session.config.layout.size, most)):
            count = min(most, session.config.layout.size - offset)
            header = pb.PullResponse(slot=slot, chunk=tensor_pb2.Chunk(offset=offset, count=count))
            frame = FrameBuffer(header, count * dtype.itemsize)
            session.exchange.read(snapshot, slot, offset, frame.payload(dtype))
            yield frame.finish()


def _pull_at_once(session: Session, dtype: np.dtype[Any], most: int) -> Iterator[bytes]:
    """Encode the parameters of one moment, and then yield them.

    The other workers do not wait for a newcomer, who would otherwise see the state change in each of its pulls.
    """
    size, frames = session.config.layout.size, list[FrameBuffer]()

    def target(offset: int) -> HostArray:
        count = min(most, size - offset)
        header = pb.PullResponse(slot=PARAM, chunk=tensor_pb2.Chunk(offset=offset, count=count))
        frames.append(FrameBuffer(header, count * dtype.itemsize))
        return frames[-1].payload(dtype)

    snapshot = session.exchange.read_parameters((offset, target) for offset in range(0, size, most))
    yield _header(snapshot, session.ledger.epoch).SerializeToString()
    for frame in frames:
        yield frame.finish()


def _asked_rows(session: Session, request: pb.PullRequest, most: int) -> list[NamedRows]:
    """Return the rows that are asked for, in parts of one message each.

    Raises:
        InvalidRequestError: a tensor is no table, or a row is out of range.
    """
    asked = []
    for place, message in enumerate(request.rows):
        rows = decode_rows(message, session.config, f"rows[{place}]")
        table = table_of(session.config.layout.tensors[message.tensor])
        size = max(most // (table.width + _INDEX_ELEMENTS), 1)
        asked += [NamedRows(table, rows[low : low + size]) for low in range(0, len(rows), size)]
    return asked


def _pull_rows(
    session: Session, slots: tuple[str, ...], asked: Sequence[NamedRows], dtype: np.dtype[Any]
) -> Iterator[bytes]:
    """Yield the messages of a pull of rows, all as of one moment.

    Raises:
        StateChangedError: as `pull`.
    """
    snapshot = session.exchange.snapshot()
    yield _header(snapshot, session.ledger.epoch).SerializeToString()
    for slot, (table, rows) in itertools.product(slots, asked):
        frame = _row_frame(slot, table, rows, dtype)
        session.exchange.read_rows(snapshot, slot, table, rows, frame.payload(dtype))
        yield frame.finish()


def _pull_ids(session: Session, tables: Sequence[int], most: int) -> Iterator[bytes]:
    """Yield the messages of a pull of ids, at most `most` each, all as of one moment.

    Raises:
        StateChangedError: as `pull`.
    """
    snapshot = session.exchange.snapshot()
    yield _header(snapshot, session.ledger.epoch).SerializeToString()
    for index in tables:
        with session.exchange.row_ids(snapshot, index) as ids:
            for low in range(0, len(ids), most):
                part = ids[low : low + most].astype("<u8")
                chunk = tensor_pb2.Chunk(offset=session.config.layout.tensors[index].offset, count=len(part))
                frame = FrameBuffer(pb.PullResponse(chunk=chunk), part.nbytes)
                frame.payload(np.dtype(np.uint8))[:] = part.view(np.uint8)
                yield frame.finish()


def _pull_rows_at_once(
    session: Session, slots: tuple[str, ...], asked: Sequence[NamedRows], dtype: np.dtype[Any]
) -> Iterator[bytes]:
    """Encode rows of one moment, and then yield them: see `_pull_at_once`."""
    nbytes = sum(len(rows) * (table.width * dtype.itemsize + _INDEX_BYTES) for table, rows in asked)
    with session.exchange.room(nbytes):
        frames = [_row_frame(PARAM, table, rows, dtype) for table, rows in asked]
        targets = [(*each, frame.payload(dtype)) for each, frame in zip(asked, frames, strict=True)]
        yield _header(session.exchange.read_rows_at_once(targets), session.ledger.epoch).SerializeToString()
        for frame in frames:
            yield frame.finish()


def _row_frame(slot: str, table: Table, rows: HostArray, dtype: np.dtype[Any]) -> FrameBuffer:
    chunk = tensor_pb2.Chunk(offset=table.start, count=len(rows) * table.width, rows=rows.tolist())
    return FrameBuffer(pb.PullResponse(slot=slot, chunk=chunk), chunk.count * dtype.itemsize)


def _header(snapshot: Snapshot, epoch: int) -> pb.PullResponse:
    header = state_pb2.PullHeader(
        step=snapshot.step,
        load=snapshot.load,
        epoch=epoch,
        tensor_steps=snapshot.tensor_steps,
        tensor_scalars=snapshot.tensor_scalars,
    )
    if snapshot.loss_scale is not None:
        header.loss_scale.scale, header.loss_scale.clean_steps = snapshot.loss_scale
    return pb.PullResponse(header=header)


def load(session: Session, opening: Frame, frames: Iterator[Frame], max_chunk_bytes: int) -> bool:
    """Receive the messages of a load and commit it; False if it had been committed before.

    Raises:
        InvalidRequestError: messages out of order, unknown slots, chunks that do not cover a slot.
        StepwireError: as `Session.loading`; the state is as before.
    """
    message: state_pb2.LoadOpen = opening.message.open
    request = _decode_load(session, message)
    with session.exchange.loading(request, session.holder_of(message.attach_token, message.worker)) as staged:
        if staged is None:
            return False
        _receive(staged, frames, max_chunk_bytes)
        staged.complete()
        return session.exchange.commit_load(staged)


def _decode_load(session: Session, message: state_pb2.LoadOpen) -> LoadRequest:
    """Validate the opening of a load.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
        UnsupportedFeatureError: a field asks for something that is not served.
    """
    slots = _known_slots(session, list(message.slots), "open.slots")
    _check_scales(session, slots)
    tables = decode_load_tables(message, session.config)
    if not message.by_rows:
        check_load(session.config, slots, bool(message.tensor_steps))
    steps = _known_steps(session, list(message.tensor_steps))
    scalars = _known_scalars(session, list(message.tensor_scalars))
    step = message.step if message.HasField("step") else None
    _check_counter(step or 0, "open.step")
    loss_scale = _known_loss_scale(session, message)
    dtype = dtype_from_wire(message.dtype, FLOAT32, "open.dtype")
    request = LoadRequest(message.load, slots, dtype, message.epoch, step, tuple(steps), loss_scale, tuple(scalars))
    return request._replace(by_rows=message.by_rows, tables=tables)


def _receive(staged: Load | RowLoad, frames: Iterator[Frame], max_chunk_bytes: int) -> None:
    for frame in frames:
        message: pb.LoadRequest = frame.message
        if message.HasField("open"):
            raise invalid_frame("open", "only the first message of a stream carries `open`")
        if message.HasField("chunk"):
            check_chunk(frame, max_chunk_bytes)
            chunk = message.chunk
            if chunk.rows:
                staged.add_rows(chunk.offset, chunk.count, np.array(chunk.rows, np.uint64), frame.payload)
            else:
                staged.add(message.slot, chunk.offset, chunk.count, frame.payload)
        elif frame.payload.size:
            raise invalid_frame("chunk", f"a payload of {frame.payload.size} bytes comes without `chunk`")
        if message.commit:
            return
    raise invalid_frame("commit", "the stream ended before `commit`; nothing was loaded")


def _known_loss_scale(session: Session, message: state_pb2.LoadOpen) -> LossScale | None:
    if not message.HasField("loss_scale"):
        return None
    field = "open.loss_scale"
    if session.loss_scale is None:
        raise InvalidRequestError(f"{field}: the session has no loss scaling", metadata={"field": field})
    check_scale(message.loss_scale.scale, f"{field}.scale")
    return LossScale(message.loss_scale.scale, message.loss_scale.clean_steps)


def _known_slots(session: Session, names: list[str], field: str) -> tuple[str, ...]:
    if not names:
        raise InvalidRequestError(f"{field}: no slot is named", metadata={"field": field})
    for index, name in enumerate(names):
        if name not in session.slots or name in names[:index]:
            raise InvalidRequestError(
                f"{field}: {name[:64]!r} is {'named twice' if name in session.slots else 'unknown'}; this session "
                f"has {', '.join(session.slots)}",
                metadata={"field": field},
            )
    return tuple(names)


def _check_scales(session: Session, slots: tuple[str, ...]) -> None:
    for slot in slots:
        owner = slot.removesuffix(SCALE_SUFFIX)
        if slot not in session.config.slots and owner not in slots:
            raise InvalidRequestError(
                f"open.slots: {slot!r} says how {owner!r} is held and is loaded with it; name both",
                metadata={"field": "open.slots"},
            )


def _known_steps(session: Session, steps: list[int]) -> list[int]:
    tensors = len(session.config.layout.tensors)
    if len(steps) not in (0, tensors):
        raise InvalidRequestError(
            f"open.tensor_steps: {len(steps)} entries; it must be 0 or {tensors}",
            metadata={"field": "open.tensor_steps"},
        )
    for step in steps:
        _check_counter(step, "open.tensor_steps")
    return steps


def _known_scalars(session: Session, scalars: list[float]) -> list[float]:
    field, tensors, config = "open.tensor_scalars", len(session.config.layout.tensors), session.config
    if scalars and config.rule.tensor_scalar is None:
        raise InvalidRequestError.of(field, f"the rule {config.rule.name} keeps no scalar for a tensor; leave it out")
    if len(scalars) not in (0, tensors):
        raise InvalidRequestError.of(field, f"{len(scalars)} entries; it must be 0 or {tensors}")
    if wrong := [scalar for scalar in scalars if not 0.0 <= scalar <= 1.0]:
        raise InvalidRequestError.of(field, f"{wrong[0]!r} is not in [0, 1]")
    return scalars


def _check_counter(value: int, field: str) -> None:
    """Keep step counts where they can be counted on from, and where float64 holds them exactly."""
    if value >= _COUNTER_END:
        raise InvalidRequestError(f"{field}: {value} is not below 2^53", metadata={"field": field})
