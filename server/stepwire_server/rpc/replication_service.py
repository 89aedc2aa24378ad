"""The service of replication: a standby follows, is promoted, is forgotten, and tells how it stands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grpc

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import replication_service_pb2 as pb
from stepwire.wire.frames import read_message
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.replication.upkeep import Upkeep
from stepwire_server.rpc.method import unary
from stepwire_server.rpc.replication_codec import decode_joining, encode_record, encode_status

__all__ = ["ReplicationService", "Standing"]


class Standing(Protocol):
    """The role of this server."""

    def following(self, shard: str = "") -> tuple[Primary, Upkeep]:
        """Return the primary that a standby follows.

        Args:
            shard: the shard of the standby; empty for one that names none.

        Raises:
            UnsupportedFeatureError: this server accepts no standby.
            FencedError: NOT_PRIMARY, this server is a standby; or STALE_EPOCH, it has another shard.
        """
        ...

    def promote(self, *, lossy: bool) -> tuple[int, int]:
        """Make this standby the primary; return its epoch, and the number of its sessions.

        Raises:
            StepwireError: as `Follower.promote`.
        """
        ...

    def status(self) -> ReplicationStatus:
        """Return how replication stands."""
        ...


class ReplicationService:
    """Serves `stepwire.v1.ReplicationService`."""

    def __init__(self, standing: Standing) -> None:
        """Serve the role of a server."""
        self._standing = standing

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the method table."""
        return grpc.method_handlers_generic_handler(
            "stepwire.v1.ReplicationService",
            {
                "Follow": grpc.stream_stream_rpc_method_handler(self.follow),
                "Promote": unary(self.promote, pb.PromoteRequest),
                "ForgetStandby": unary(self.forget_standby, pb.ForgetStandbyRequest),
                "GetReplication": unary(self.get_replication, pb.GetReplicationRequest),
            },
        )

    def follow(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send records to a standby, and hear its acknowledgements."""
        first = next(messages, None)
        if first is None:
            raise InvalidRequestError.of("open", "the stream brought no message", reason=Reason.INVALID_FRAME)
        joining = decode_joining(read_message(pb.FollowRequest, first))
        primary, upkeep = self._standing.following(joining.shard)
        opened = primary.join(joining)
        reader = opened.reader
        context.add_callback(lambda: primary.left(reader))
        hearing = threading.Thread(
            target=_hear, args=(primary, upkeep, reader, messages), name="acknowledgements", daemon=True
        )
        hearing.start()
        try:
            yield pb.FollowResponse(
                opened=pb.FollowOpened(primary_id=primary.server_id, epoch=primary.epoch, whole=opened.whole)
            ).SerializeToString()
            for record in primary.outbox.read(reader, opened.after):
                yield encode_record(record)
            primary.check_deposed()
        finally:
            primary.left(reader)

    def promote(self, request: pb.PromoteRequest, context: grpc.ServicerContext) -> Any:
        """Make this standby the primary."""
        epoch, sessions = self._standing.promote(lossy=request.lossy)
        return pb.PromoteResponse(epoch=epoch, sessions=sessions)

    def forget_standby(self, request: pb.ForgetStandbyRequest, context: grpc.ServicerContext) -> Any:
        """Accept another standby in the place of the one that is known."""
        return pb.ForgetStandbyResponse(standby_id=self._standing.following()[0].forget_standby())

    def get_replication(self, request: pb.GetReplicationRequest, context: grpc.ServicerContext) -> Any:
        """Tell how replication stands."""
        return encode_status(self._standing.status())


def _hear(primary: Primary, upkeep: Upkeep, reader: int, messages: Iterator[bytes]) -> None:
    """Hear a standby until its stream ends."""
    try:
        for data in messages:
            message: Any = read_message(pb.FollowRequest, data)
            kind = message.WhichOneof("message")
            if primary.outbox.reader != reader:
                return
            if kind == "acknowledgement":
                primary.outbox.acknowledge(message.acknowledgement.number)
            elif kind == "digest":
                upkeep.digested(message.digest.session_id, message.digest.number, message.digest.digest)
            elif kind == "problem":
                upkeep.problem(message.problem.session_id, message.problem.problem)
            elif kind == "refusal":
                primary.refused(reader, message.refusal.epoch)
            elif kind == "leave":
                primary.leave(reader)
    except Exception:  # the stream has broken, which gRPC tells by an error of its own
        return
    finally:
        primary.left(reader)
