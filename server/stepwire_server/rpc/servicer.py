"""The servicer: decode, one call, encode. Errors rise to the interceptor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import grpc

from stepwire.v1 import attach_pb2, server_pb2, transport_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN, __version__
from stepwire.wire.frames import Frame, read_frame, read_message
from stepwire.wire.messages import duration_to_wire
from stepwire.wire.packets import PAYLOAD_BYTES
from stepwire_server.config import ServerConfig
from stepwire_server.rpc import pull_and_load as transfer
from stepwire_server.rpc import session_lines
from stepwire_server.rpc.access import caller_of, identity_of, token_of
from stepwire_server.rpc.attach import StepStream, invalid_frame
from stepwire_server.rpc.checkpoint_service import CheckpointService
from stepwire_server.rpc.compiled_lane import LaneParts, compiled_lane
from stepwire_server.rpc.decode_config import decode_page_token, decode_request_id, decode_session_config
from stepwire_server.rpc.decode_step import DEFAULT_REPLY_BYTES
from stepwire_server.rpc.encode import encode_device, encode_parked, encode_session
from stepwire_server.rpc.end_call import end_call
from stepwire_server.rpc.features import SERVED_FEATURES
from stepwire_server.rpc.method import unary
from stepwire_server.rpc.move_service import MoveService
from stepwire_server.rpc.packet_steps import PacketSteps, end_together
from stepwire_server.rpc.serving import Serving
from stepwire_server.rpc.statistics_service import StatisticsService
from stepwire_server.rpc.unary_step import step_once
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.parked import ParkedSession
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.tenants import TenantSessions
from stepwire_server.sessions.workers import Holder
from stepwire_server.sharing.offer import Sharing, StreamTransport

__all__ = ["OptimizerService"]

_DEFAULT_PAGE = 100
_LARGEST_PAGE = 1000


class OptimizerService:
    """Serves `stepwire.v1.OptimizerService`."""

    def __init__(
        self,
        registry: Registry,
        serving: Serving,
        config: ServerConfig,
        sharing: Sharing,
        *,
        instance_id: str,
        local: transport_pb2.LocalAccess,
    ) -> None:
        """Serve the sessions of `registry`; `local` and `sharing` are for clients on the same machine."""
        self._access = serving.access
        self._registry = registry
        self._serving = serving
        self._config = config
        self._instance_id = instance_id
        self._local = local
        self._sharing = sharing
        off = set() if config.data_dir else {"durability_checkpoint", "durability_journal"}
        off |= set() if config.standby or config.standby_of else {"durability_replicated"}
        self._features_off = sharing.features_off | off

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the method table.

        Written out instead of generated, because bulk messages pass as bytes: see `stepwire.wire.frames`. The others
        are parsed here too: what gRPC's own deserializer cannot read is INTERNAL, and a client's mistake is not.
        """
        return grpc.method_handlers_generic_handler(
            "stepwire.v1.OptimizerService",
            {
                "GetServerInfo": unary(self.get_server_info, pb.GetServerInfoRequest),
                "CreateSession": unary(self.create_session, pb.CreateSessionRequest),
                "GetSession": unary(self.get_session, pb.GetSessionRequest),
                "ListSessions": unary(self.list_sessions, pb.ListSessionsRequest),
                "DeleteSession": unary(self.delete_session, pb.DeleteSessionRequest),
                "Attach": grpc.stream_stream_rpc_method_handler(self.attach),
                "Step": grpc.unary_unary_rpc_method_handler(self.step),
                "Pull": grpc.unary_stream_rpc_method_handler(self.pull),
                "Load": grpc.stream_unary_rpc_method_handler(
                    self.load, response_serializer=pb.LoadResponse.SerializeToString
                ),
                **CheckpointService(self._registry, self._serving, self._config, self._sessions).handlers(),
                **MoveService(self._registry, self._serving, self._sessions).handlers(),
                **StatisticsService(self._registry, self._serving, self._tenant).handlers(),
            },
        )

    def _sessions(self, context: grpc.ServicerContext) -> TenantSessions:
        """Return the sessions that the caller sees."""
        return TenantSessions(self._registry, self._tenant(context))

    def _tenant(self, context: grpc.ServicerContext) -> str | None:
        """Return the tenant whose sessions the caller sees; None for those of all."""
        return identity_of(context, self._access).sees

    def get_server_info(self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext) -> Any:
        """Tell what this server is and can do."""
        config, sessions = self._config, self._sessions(context)
        return pb.GetServerInfoResponse(
            version=__version__,
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            instance_id=self._instance_id,
            devices=[encode_device(device, sessions.reserved_bytes(device)) for device in self._registry.pool],
            limits=server_pb2.Limits(
                max_sessions=config.max_sessions,
                max_tensors=config.max_tensors,
                max_chunk_bytes=config.max_chunk_bytes,
                max_unary_bytes=min(config.max_chunk_bytes, DEFAULT_REPLY_BYTES),
                max_streams=config.max_streams,
                max_lease=duration_to_wire(config.max_lease_seconds),
                step_idle=duration_to_wire(config.step_idle_seconds),
            ),
            features=[name for name in SERVED_FEATURES if name not in self._features_off],
            sessions=sessions.statistics().sessions,
            draining=self._serving.drain.started,
            local=self._local,
            not_serving=self._serving.not_serving(),
            shard=config.shard,
            epoch=self._registry.epoch,
        )

    def create_session(self, request: pb.CreateSessionRequest, context: grpc.ServicerContext) -> Any:
        """Create a session."""
        request_id = decode_request_id(request.request_id)
        config = decode_session_config(request.config, self._config)
        with self._serving.drain.admit():
            created = self._sessions(context).create(request_id, config)
        session_lines.created(created, context)
        response = pb.CreateSessionResponse(
            session=encode_session(created.session, self._registry.clock(), whole=True),
            attach_token=created.token,
            replayed=created.replayed,
        )
        created.session.settle()
        return response

    def get_session(self, request: pb.GetSessionRequest, context: grpc.ServicerContext) -> Any:
        """Tell how a session stands."""
        session = self._sessions(context).get(request.session_id)
        response = pb.GetSessionResponse(session=encode_session(session, self._registry.clock(), whole=True))
        session.settle()
        return response

    def list_sessions(self, request: pb.ListSessionsRequest, context: grpc.ServicerContext) -> Any:
        """List sessions."""
        size = min(request.page_size or _DEFAULT_PAGE, _LARGEST_PAGE)
        sessions, token = self._sessions(context).page(decode_page_token(request.page_token), size)
        now = self._registry.clock()
        return pb.ListSessionsResponse(
            sessions=[
                encode_parked(session)
                if isinstance(session, ParkedSession)
                else encode_session(session, now, whole=False)
                for session in sessions
            ],
            next_page_token=token,
        )

    def delete_session(self, request: pb.DeleteSessionRequest, context: grpc.ServicerContext) -> Any:
        """End a session."""
        applied_step = self._sessions(context).delete(request.session_id, request.attach_token)
        session_lines.closed(request.session_id, applied_step, context)
        return pb.DeleteSessionResponse(applied_step=applied_step)

    def attach(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Attach a client and take its steps."""
        with self._registry.streams.stream(context.cancel) as stream:
            stream.refuse = functools.partial(end_call, context)
            context.add_callback(stream.left)
            stream.check = functools.partial(self._access.check, caller_of(context, self._access))
            frames = map(functools.partial(read_frame, pb.AttachRequest), stream.received(messages))
            # Counted, and cancelled when silent, from before its opening: a flood of streams that never open would
            # take every thread otherwise.
            stream.in_step = True
            opening: attach_pb2.AttachOpen = _opening(frames).message.open
            stream.is_open, stream.in_step = True, False
            session = self._sessions(context).get(opening.session_id)
            worker = None if opening.any_worker else opening.worker
            self._registry.streams.admit(stream, session.tenant, returns=worker in session.ledger.members.attached)
            with (
                _attached(session, stream, opening, worker) as holder,
                self._sharing.share(session, opening.transport, token_of(context, self._access)) as shared,
                session_lines.attached(session, holder, shared, context),
            ):
                stream.transport = session_lines.transport_name(shared, context.peer())
                opened = _opened(session, holder, shared)
                session.settle()  # other workers may have stepped since
                yield opened.SerializeToString()
                steps = StepStream(session, holder, stream, self._serving, shared.buffers)
                if shared.lane is None:
                    yield from steps.replies(frames)
                    return
                end_together(shared.lane, stream, context)
                serving = self._serving._replace(most_reply_bytes=PAYLOAD_BYTES)
                packets = StepStream(session, holder, stream, serving, shared.buffers)
                parts = LaneParts(shared.lane, session, holder, stream, serving, shared.buffers)
                compiled = compiled_lane(parts, packets)
                yield from PacketSteps(shared.lane, stream, packets, steps, compiled).replies(messages)

    def step(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """Take one step of a small session in one call."""
        frame = read_frame(pb.StepRequest, data)
        request: pb.StepRequest = frame.message
        session = self._sessions(context).get(request.session_id)
        with self._serving.drain.admit(), session.calls.one():  # kernels may be compiled, which outlasts a short lease
            return step_once(session, frame, self._serving)

    def pull(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream state out."""
        request = read_message(pb.PullRequest, data)
        return transfer.pull(self._sessions(context).get(request.session_id), request, self._config.max_chunk_bytes)

    def load(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.LoadResponse:
        """Stream state in."""
        frames = map(functools.partial(read_frame, pb.LoadRequest), messages)
        opening = _opening(frames)
        session = self._sessions(context).get(opening.message.open.session_id)
        with self._serving.drain.admit():
            loaded = transfer.load(session, opening, frames, self._config.max_chunk_bytes)
        description = encode_session(session, self._registry.clock(), whole=False)
        session.settle()
        loader = session.ledger.members.loader(opening.message.open.load)
        return pb.LoadResponse(session=description, replayed=not loaded, worker=loader)


def _attached(
    session: Session, stream: ClientStream, opening: attach_pb2.AttachOpen, worker: int | None
) -> contextlib.AbstractContextManager[Holder]:
    token, epoch = opening.attach_token, opening.epoch
    return session.attached(stream, token, epoch, opening.durable_step, worker, opening.acquisition)


def _opening(frames: Iterator[Frame]) -> Frame:
    first = next(frames, None)
    if first is None or not first.message.HasField("open"):
        raise invalid_frame("open", "the first message of a stream must carry `open`")
    others = [field.name for field, _ in first.message.ListFields() if field.name not in ("open", "padding")]
    if others or first.payload.size:
        raise invalid_frame(others[0] if others else "payload", "the first message of a stream carries `open` alone")
    return first


def _opened(session: Session, holder: Holder, shared: StreamTransport) -> pb.AttachResponse:
    ledger, member = session.ledger, session.ledger.members[holder.worker]
    several = session.config.aggregation is not None
    return pb.AttachResponse(
        opened=attach_pb2.AttachOpened(
            attach_token=holder.token,
            epoch=ledger.epoch,
            applied_step=ledger.applied_step,
            durable_step=ledger.durable_step,
            applied_load=ledger.applied_load,
            unfinished_step=session.unfinished_step,
            ready=ledger.ready,
            transport=shared.transport,
            transport_reason=shared.reason,
            handoff=shared.handoff,
            worker=holder.worker,
            contribution=member.number,
            begins_anew=several and member.begins_anew(ledger.applied_load),
            worker_load=None if ledger.members.loader(ledger.applied_load) is None else member.loaded,
        )
    )
