"""The messages of pulls and loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stepwire.arrays.packing import Flat, Packer
from stepwire.arrays.rows import IdTarget, PulledRows, RowReader, RowTarget, row_parts
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.errors import StateChangedError, StateLossError, StepMismatchError, UnavailableError
from stepwire.links.hold import Hold
from stepwire.links.link import Load
from stepwire.links.repetition import repeated
from stepwire.steps.description import SessionDescription
from stepwire.transports.route import Route
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, tensor_pb2
from stepwire.wire.dtypes import FLOAT32, dtype_to_wire
from stepwire.wire.frames import FrameBuffer, read_frame

__all__ = ["load_by_number", "load_messages", "read_pull", "receive_pull", "send_load"]


def read_pull(
    messages: Iterator[bytes],
    packer: Packer,
    dtype: np.dtype[Any],
    targets: Mapping[str, Flat],
    rows: PulledRows = (),
) -> state_pb2.PullHeader:
    """Decode the messages of a pull into the target arrays of each slot, or of one slot's rows, or into ids.

    Raises:
        UnavailableError: the server ended the stream early.
    """
    header: state_pb2.PullHeader | None = None
    missing = 0 if rows else packer.layout.size * len(targets)
    reader = RowReader(packer.layout, [target for target in rows if isinstance(target, RowTarget)])
    ids = {packer.layout.tensors[target.tensor].offset: target for target in rows if isinstance(target, IdTarget)}
    for each in ids.values():  # an attempt before may have left some
        each.found[each.part] = []
    for data in messages:
        frame = read_frame(pb.PullResponse, data)
        message: pb.PullResponse = frame.message
        if message.HasField("header"):
            header = message.header
        if message.HasField("chunk"):
            chunk = message.chunk
            if chunk.rows:
                reader.read(chunk, frame.payload.view(dtype))
                continue
            if ids:
                own = ids[chunk.offset]
                own.found[own.part].append(frame.payload.view("<u8").astype(np.uint64))
                continue
            packer.read(
                targets[message.slot],
                packer.ranges(chunk.offset, chunk.count),
                frame.payload.view(dtype),
            )
            missing -= chunk.count
    if header is None or missing or reader.missing:
        left = f"{reader.missing} rows" if rows else f"{missing} elements"
        raise UnavailableError(f"the server ended a pull {left} early; pull again")
    return header


def receive_pull(
    calls: Calls,
    description: SessionDescription,
    targets: Mapping[str, Flat],
    dtype: np.dtype[Any],
    deadline: Deadline,
    rows: PulledRows = (),
) -> state_pb2.PullHeader:
    """Ask for slots once, and read them into the target arrays of each; or for rows of tables in one slot.

    Raises:
        StepwireError: the server's refusal, or a broken connection.
    """
    request = pb.PullRequest(
        session_id=description.session_id,
        slots=targets,
        dtype=dtype_to_wire(dtype),
        chunk_bytes=description.chunk_bytes,
        rows=[
            tensor_pb2.TableRows(tensor=target.tensor, rows=target.indices.tolist())
            for target in rows
            if isinstance(target, RowTarget)
        ],
        row_ids=[target.tensor for target in rows if isinstance(target, IdTarget)],
    )
    return calls.download(
        "Pull", request, lambda messages: read_pull(messages, description.packer, dtype, targets, rows), deadline
    )


def send_load(
    calls: Calls, opening: state_pb2.LoadOpen, load: Load, description: SessionDescription, deadline: Deadline
) -> pb.LoadResponse | pb.RollbackResponse:
    """Send a load once, or the request for one whose values the server has.

    Raises:
        StepwireError: the server's refusal, or a broken connection.
    """
    if load.origin is None:
        messages = load_messages(opening, description.packer, load, description.chunk_bytes)
        loaded: pb.LoadResponse = calls.upload("Load", messages, pb.LoadResponse, deadline)
        return loaded
    request = pb.RollbackRequest(
        session_id=opening.session_id,
        attach_token=opening.attach_token,
        load=opening.load,
        epoch=opening.epoch,
        applied_step=opening.step if opening.HasField("step") else None,
        worker=opening.worker,
    )
    load.origin.fill(request)
    # A stream of one message is a unary call on the wire, and `unary` would repeat it under a hold that has been lost.
    rolled_back: pb.RollbackResponse = calls.upload(
        "Rollback", [request.SerializeToString()], pb.RollbackResponse, deadline
    )
    return rolled_back


def load_messages(opening: state_pb2.LoadOpen, packer: Packer, load: Load, chunk_bytes: int) -> Iterator[bytes]:
    """Yield the messages of a load of float32 values, each made on demand."""
    sent_bytes = 0
    opening.dtype = dtype_to_wire(FLOAT32)
    yield pb.LoadRequest(open=opening).SerializeToString()
    for part in row_parts(load.rows or (), FLOAT32, chunk_bytes):
        header = pb.LoadRequest(slot="param", chunk=tensor_pb2.Chunk())
        part.describe(header.chunk)
        frame = FrameBuffer(header, part.elements * FLOAT32.itemsize)
        part.write(frame.payload(FLOAT32))
        yield frame.finish()
        sent_bytes += part.elements * FLOAT32.itemsize
        if load.progress is not None:
            load.progress.sent(opening.session_id, sent_bytes)
    for slot, flat in load.sources.items():
        for offset, count, ranges in packer.chunks(chunk_bytes // FLOAT32.itemsize):
            header = pb.LoadRequest(slot=slot, chunk=tensor_pb2.Chunk(offset=offset, count=count))
            frame = FrameBuffer(header, count * FLOAT32.itemsize)
            packer.write(flat, ranges, frame.payload(FLOAT32))
            yield frame.finish()
            sent_bytes += count * FLOAT32.itemsize
            if load.progress is not None:
                load.progress.sent(opening.session_id, sent_bytes)
    yield pb.LoadRequest(commit=True).SerializeToString()


def load_by_number(route: Route, hold: Hold, description: SessionDescription, load: Load, deadline: Deadline) -> None:
    """Send a load with its number, or with the next one, until it is committed.

    Raises:
        StateLossError: the server has lost steps or loads, and the load does not bring everything.
        StateChangedError: another worker's load has its number.
        StepwireError: as `SessionLink.load`.
    """
    opening = load.opening()
    opening.session_id = description.session_id

    def attempt(left: Deadline) -> pb.LoadResponse | pb.RollbackResponse:
        if hold.epoch == 0 or not hold.is_certain:
            hold.attach(left)
        hold.check_kept(steps=not load.whole)
        if load.step is None and not description.is_aggregated:
            opening.step = hold.step_on_server  # so that a load that arrives after a step is refused
        opening.attach_token, opening.epoch, opening.worker = hold.token, hold.epoch, hold.worker or 0
        return send_load(route.way(left).calls, opening, load, description, left)

    while True:
        opening.load = load.number or (hold.applied_load if load.as_one else hold.load_on_server) + 1
        try:
            response = repeated(route, hold, attempt, deadline)
        except StateLossError:  # the load was not committed: the server knows none of its number
            raise
        except BaseException as failure:
            if load.as_one or (taken := _others(failure, opening.load)) is None:
                hold.load_failed(opening.load)
                raise
        else:
            if load.as_one or not response.HasField("worker") or response.worker == (hold.worker or 0):
                hold.loaded(opening.load, response.session.applied_step)
                return
            taken = opening.load
        hold.other_load(taken)
        if load.number:
            raise StateChangedError(
                f"load {load.number} is another worker's; load again", metadata={"applied_load": taken}
            )


def _others(failure: BaseException, load: int) -> int | None:
    """Return the last load, of another worker, that a load was refused for; None for any other failure."""
    if not isinstance(failure, StepMismatchError):
        return None
    own, expected = failure.metadata.get("worker_load"), failure.metadata.get("expected_load")
    return None if own is None or expected is None or int(own) >= load else int(expected) - 1
