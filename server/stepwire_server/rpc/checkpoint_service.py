"""The methods about checkpoints: decode, one call, encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from stepwire.errors import InvalidRequestError, SessionNotFoundError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.config import ServerConfig
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.rpc import session_lines
from stepwire_server.rpc.decode_config import decode_fork_config, decode_request_id
from stepwire_server.rpc.encode import encode_checkpoint, encode_session
from stepwire_server.rpc.method import unary
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.earlier import Origin
from stepwire_server.sessions.named_checkpoints import NamedCheckpoints
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.rollback import Rollbacks
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.tenants import TenantSessions

__all__ = ["CheckpointService"]

_STEP_END = 2**53


class CheckpointService:
    """Serves the part of `stepwire.v1.OptimizerService` that is about checkpoints."""

    def __init__(
        self,
        registry: Registry,
        serving: Serving,
        config: ServerConfig,
        sessions: Callable[[grpc.ServicerContext], TenantSessions],
    ) -> None:
        """Serve the sessions of `registry`; `sessions` returns those that a caller sees."""
        self._sessions = sessions
        self._registry = registry
        self._serving = serving
        self._config = config
        self._checkpoints = NamedCheckpoints(registry)
        self._rollbacks = Rollbacks(registry, self._checkpoints)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the rows of the method table."""
        return {
            "SaveCheckpoint": unary(self.save_checkpoint, pb.SaveCheckpointRequest),
            "ListCheckpoints": unary(self.list_checkpoints, pb.ListCheckpointsRequest),
            "VerifyCheckpoint": unary(self.verify_checkpoint, pb.VerifyCheckpointRequest),
            "DeleteCheckpoint": unary(self.delete_checkpoint, pb.DeleteCheckpointRequest),
            "Rollback": unary(self.rollback, pb.RollbackRequest),
            "ForkSession": unary(self.fork_session, pb.ForkSessionRequest),
        }

    def save_checkpoint(self, request: pb.SaveCheckpointRequest, context: grpc.ServicerContext) -> Any:
        """Save a checkpoint under a name."""
        sessions = self._sessions(context)
        session = sessions.get(request.session_id)
        sessions.check_disk(lambda: request.name in {each.name for each in self._checkpoints.list(session.session_id)})
        with self._serving.drain.admit(), session.calls.one():
            saved = self._checkpoints.save(session, request.name)
        return pb.SaveCheckpointResponse(checkpoint=encode_checkpoint(saved.info), replayed=saved.replayed)

    def list_checkpoints(self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext) -> Any:
        """List the checkpoints of a session."""
        found = self._checkpoints.list(self._sessions(context).check(request.session_id))
        return pb.ListCheckpointsResponse(checkpoints=map(encode_checkpoint, found))

    def verify_checkpoint(self, request: pb.VerifyCheckpointRequest, context: grpc.ServicerContext) -> Any:
        """Read all of a checkpoint."""
        info = self._checkpoints.verify(self._sessions(context).check(request.session_id), request.name)
        return pb.VerifyCheckpointResponse(checkpoint=encode_checkpoint(info))

    def delete_checkpoint(self, request: pb.DeleteCheckpointRequest, context: grpc.ServicerContext) -> Any:
        """Delete a checkpoint."""
        self._checkpoints.delete(self._sessions(context).check(request.session_id), request.name)
        return pb.DeleteCheckpointResponse()

    def rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> Any:
        """Replace the state by an earlier one."""
        session = self._sessions(context).get(request.session_id)
        origin = _origin(request)
        if origin is None:
            raise InvalidRequestError.of("checkpoint", "name the checkpoint, or the step, to go back to")
        step = request.applied_step if request.HasField("applied_step") else None
        if (step or 0) >= _STEP_END:
            raise InvalidRequestError.of("applied_step", f"{step} is not below 2^53")
        numbers = LoadRequest(request.load, (), epoch=request.epoch, step=step)
        with self._serving.drain.admit(), session.calls.one():
            holder = session.holder_of(request.attach_token, request.worker)
            done = self._rollbacks.roll_back(session, holder, numbers, origin)
        return pb.RollbackResponse(
            session=encode_session(session, self._registry.clock(), whole=False),
            replayed=not done,
            worker=session.ledger.members.loader(request.load),
        )

    def fork_session(self, request: pb.ForkSessionRequest, context: grpc.ServicerContext) -> Any:
        """Create a session that begins with a state of another one."""
        request_id = decode_request_id(request.request_id)
        sessions = self._sessions(context)
        session = _session_to_fork(sessions, request.session_id, request_id)
        config = decode_fork_config(request, session.config, self._config)
        if config.durability.on_disk:
            sessions.check_disk(lambda: sessions.created(request_id) is not None)
        with self._serving.drain.admit(), session.calls.one():
            created = self._rollbacks.fork(session, sessions.named(request_id), config, _origin(request))
        session_lines.created(created, context)
        return pb.ForkSessionResponse(
            session=encode_session(created.session, self._registry.clock(), whole=True),
            attach_token=created.token,
            replayed=created.replayed,
        )


def _session_to_fork(sessions: TenantSessions, session_id: str, request_id: str) -> Session:
    """Return a session; in the place of one that has ended, the fork that the request made while it was there."""
    try:
        return sessions.get(session_id)
    except SessionNotFoundError:
        if (fork := sessions.created(request_id)) is None:
            raise
        return fork.session


def _origin(request: pb.RollbackRequest | pb.ForkSessionRequest) -> Origin | None:
    match request.WhichOneof("origin"):
        case "checkpoint":
            return Origin(checkpoint=request.checkpoint)
        case "step":
            return Origin(step=request.step)
        case _:
            return None
