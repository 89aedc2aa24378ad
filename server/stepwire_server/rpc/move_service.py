"""The methods about moves to other servers: decode, one call, encode."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import structlog

from stepwire.errors import InvalidRequestError
from stepwire.v1 import move_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.frames import FrameBuffer, read_frame, read_message
from stepwire.wire.messages import seconds_from_wire
from stepwire_server.durability.moved import LONGEST_TARGET, MOST_SHARDS, MovedShard
from stepwire_server.rpc.attach import check_chunk, invalid_frame
from stepwire_server.rpc.decode_config import decode_request_id
from stepwire_server.rpc.decode_step import decode_chunk_bytes
from stepwire_server.rpc.method import unary
from stepwire_server.rpc.serving import Serving
from stepwire_server.rpc.state_numbers import decode_contributions, decode_numbers, encode_contributions, encode_numbers
from stepwire_server.sessions.attach_tokens import KEY_BYTES
from stepwire_server.sessions.freeze import Rest
from stepwire_server.sessions.moves import Moves
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.tenants import TenantSessions
from stepwire_server.steps.coverage import typed_payload
from stepwire_server.steps.reply import split_range

__all__ = ["MoveService"]

_log = structlog.get_logger()
_LONGEST_FREEZE_SECONDS: Final = 600.0
_SESSION_ID: Final = re.compile("[0-9a-f]{32}")


class MoveService:
    """Serves the part of `stepwire.v1.OptimizerService` that is about moves."""

    def __init__(
        self,
        registry: Registry,
        serving: Serving,
        sessions: Callable[[grpc.ServicerContext], TenantSessions],
    ) -> None:
        """Serve the sessions of `registry`; `sessions` returns those that a caller sees."""
        self._sessions = sessions
        self._serving = serving
        self._moves = Moves(registry)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the rows of the method table."""
        return {
            "FreezeSession": unary(self.freeze_session, pb.FreezeSessionRequest),
            "ThawSession": unary(self.thaw_session, pb.ThawSessionRequest),
            "ExportSession": grpc.unary_stream_rpc_method_handler(self.export_session),
            "ImportSession": grpc.stream_unary_rpc_method_handler(
                self.import_session, response_serializer=pb.ImportSessionResponse.SerializeToString
            ),
            "HandOverSession": unary(self.hand_over_session, pb.HandOverSessionRequest),
            "GetSuccessor": unary(self.get_successor, pb.GetSuccessorRequest),
        }

    def freeze_session(self, request: pb.FreezeSessionRequest, context: grpc.ServicerContext) -> Any:
        """Freeze a session at the end of a step."""
        move_id, seconds = _move_id(request.move_id), seconds_from_wire(request.lease)
        if not 0 < seconds <= _LONGEST_FREEZE_SECONDS:
            raise InvalidRequestError.of("lease", f"{seconds!r} s is not in (0, {_LONGEST_FREEZE_SECONDS:g}]")
        session = self._sessions(context).get(request.session_id)
        with session.calls.one():
            last = decode_contributions(request.last_contributions)
            anew = [each.worker for each in request.last_contributions if each.begins_anew]
            frozen = self._moves.freeze(session, move_id, request.last_step, seconds, last, anew)
        return pb.FreezeSessionResponse(
            applied_step=frozen.applied_step,
            last_step=frozen.last_step,
            applied_load=frozen.applied_load,
            epoch=frozen.epoch,
            contributions=encode_contributions(frozen.contributions, frozen.begin_anew),
            last_contributions=encode_contributions(frozen.last_contributions),
        )

    def thaw_session(self, request: pb.ThawSessionRequest, context: grpc.ServicerContext) -> Any:
        """End a freeze before its time."""
        self._sessions(context).get(request.session_id).passage.thaw(_move_id(request.move_id))
        return pb.ThawSessionResponse()

    def export_session(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream the whole state of a frozen session."""
        request = read_message(pb.ExportSessionRequest, data)
        most = decode_chunk_bytes(request.chunk_bytes, self._serving.max_chunk_bytes, "chunk_bytes")
        session = self._sessions(context).get(request.session_id)
        return _exported(session, _move_id(request.move_id), most // FLOAT32.itemsize)

    def import_session(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.ImportSessionResponse:
        """Bring a new session into a state that other sessions have exported."""
        frames = map(functools.partial(read_frame, pb.ImportSessionRequest), messages)
        first = next(frames, None)
        if first is None or not first.message.HasField("open") or first.payload.size:
            raise invalid_frame("open", "the first message of a stream must carry `open` alone")
        opening: move_pb2.ImportOpen = first.message.open
        session = self._sessions(context).get(opening.session_id)
        with self._serving.drain.admit(), session.passage.importing(opening.attach_token) as imported:
            for frame in frames:
                message: pb.ImportSessionRequest = frame.message
                if message.HasField("numbers"):
                    key = session.passage.complete(imported, decode_numbers(message.numbers, session.config))
                    break
                check_chunk(frame, self._serving.max_chunk_bytes)
                values = typed_payload(frame.payload, message.chunk.count, FLOAT32)
                imported.add(message.slot, message.chunk.offset, values)
            else:
                raise invalid_frame("numbers", "the stream ended before `numbers`; end the session")
            self._moves.keep(session)
        return pb.ImportSessionResponse(applied_step=session.ledger.applied_step, attach_key=key)

    def hand_over_session(self, request: pb.HandOverSessionRequest, context: grpc.ServicerContext) -> Any:
        """End a session that lives on elsewhere."""
        session_id = self._sessions(context).check(request.session_id)
        contributions = decode_contributions(request.contributions)
        rest = Rest(_move_id(request.move_id), request.step, request.load, request.epoch, contributions)
        shards = _shards(request.successor)
        done = self._moves.hand_over(session_id, rest, shards, decided=request.decided)
        if done:
            _log.info("session moved", session_id=session_id, shards=len(shards), peer=context.peer())
        return pb.HandOverSessionResponse(replayed=not done)

    def get_successor(self, request: pb.GetSuccessorRequest, context: grpc.ServicerContext) -> Any:
        """Tell where a session lives on."""
        session_id = self._sessions(context).check(request.session_id)
        shards = self._moves.successor(session_id, request.attach_token, request.worker)
        response = pb.GetSuccessorResponse()
        for each, token in shards:
            response.successor.shards.add(session_id=each.session_id, target=each.target, attach_token=token)
        return response


def _exported(session: Session, move_id: str, most: int) -> Iterator[bytes]:
    with session.calls.one(), session.passage.exported(move_id) as captured:
        for slot, start, values in captured.blocks:
            for low, high in split_range(0, len(values), most):
                header = pb.ExportSessionResponse(slot=slot)
                header.chunk.CopyFrom(tensor_pb2.Chunk(offset=start + low, count=high - low))
                frame = FrameBuffer(header, (high - low) * FLOAT32.itemsize)
                frame.payload(FLOAT32)[:] = values[low:high]
                yield frame.finish()
        numbers = encode_numbers(captured)
    session.settle()  # an owner that was overtaken has perhaps other steps
    yield pb.ExportSessionResponse(numbers=numbers).SerializeToString()


def _shards(successor: move_pb2.Successor) -> list[MovedShard]:
    """Decode a successor, which this server keeps.

    Raises:
        InvalidRequestError: it has more shards than are kept, or a shard without an id, with a longer target, or with
            another key.
    """
    if len(successor.shards) > MOST_SHARDS:
        raise InvalidRequestError.of(
            "successor.shards", f"{len(successor.shards)} shards; at most {MOST_SHARDS} are kept"
        )
    for place, each in enumerate(successor.shards):
        if not _SESSION_ID.fullmatch(each.session_id):
            raise InvalidRequestError.of(
                f"successor.shards[{place}].session_id", f"{each.session_id[:64]!r} is not 32 hexadecimal digits"
            )
        if not 0 < len(each.target) <= LONGEST_TARGET:
            raise InvalidRequestError.of(
                f"successor.shards[{place}].target",
                f"it has {len(each.target)} characters; a target has 1 to {LONGEST_TARGET}",
            )
        if len(each.attach_key) not in (0, KEY_BYTES):
            raise InvalidRequestError.of(
                f"successor.shards[{place}].attach_key", f"{len(each.attach_key)} bytes; it has {KEY_BYTES}, or none"
            )
    return [MovedShard(each.session_id, each.target, each.attach_key) for each in successor.shards]


def _move_id(move_id: str) -> str:
    """Check the name of a move.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return decode_request_id(move_id)
    except InvalidRequestError as error:
        raise InvalidRequestError.of("move_id", str(error).partition(": ")[2]) from None
