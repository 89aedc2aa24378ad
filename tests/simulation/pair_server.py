"""A server of a pair: real sessions, records, claims and calls; the network and the time are simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import transport_pb2
from stepwire.wire.directory import ShardDirectory
from stepwire.wire.error_details import error_from_call
from stepwire_server.access.control import AccessControl
from stepwire_server.config import ServerConfig
from stepwire_server.replication.claims import Claims
from stepwire_server.rpc.drain import Drain
from stepwire_server.rpc.interceptor import ErrorInterceptor
from stepwire_server.rpc.replicating import Replication
from stepwire_server.rpc.replication_service import ReplicationService
from stepwire_server.rpc.role_interceptor import RoleInterceptor
from stepwire_server.rpc.servicer import OptimizerService
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits
from stepwire_server.sharing.offer import Sharing
from tests.simulation.runtime import Process, Scheduler
from tests.simulation.servers import OFF, Details, Inline, tells_of_state
from tests.support.numpy_server import numpy_pool

__all__ = ["PORT", "SHARD", "PairServer"]

PORT: Final = 2000
SHARD: Final = "a"
_CHUNK_BYTES: Final = 4096
_OF_STATE: Final = (
    Reason.SESSION_NOT_FOUND,
    Reason.STEP_MISMATCH,
    Reason.STALE_EPOCH,
    Reason.FENCED,
    Reason.DURABLE_STEP_LOST,
    Reason.INTERNAL,
)


class PairServer:
    """One process, from its start to its end.

    Attributes:
        index: its address is `PORT` and this.
        process: the process.
        is_open: it accepts connections.
        is_over: it has no role any more, and wants another process in its place.
        registry: its sessions.
        replication: its role.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        directory: Any,
        index: int,
        ended: Callable[[PairServer], object] = lambda server: None,
        **settings: Any,
    ) -> None:
        """Be ready to start; `ended` is called once the process has ended by itself."""
        self.index, self.process = index, Process(f"server {index}")
        self.is_over = False
        self._ended = ended
        self.is_open = False
        self.registry: Registry | None = None
        self.replication: Replication | None = None
        self._scheduler, self._directory, self._settings = scheduler, directory, settings
        self._claims = Claims(directory, SHARD)
        self._handlers: dict[str, Any] = {}
        self._guard: Any = None
        self._role: Any = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{PORT + self.index}"

    @property
    def is_speaking(self) -> bool:
        """Tell whether the newest claim is this server's."""
        return self.replication is not None and self._claims.newest().server == self.replication.server_id

    def start(self) -> None:
        """Start as a process does."""
        self._scheduler.spawn(self._main, self.process, "main")

    def handler(self, method: str) -> Any:
        """See `Endpoint`."""
        details = Details(method)
        service = self._handlers[method.split("/")[1]]
        inner = self._role.intercept_service(service.service, details)
        return self._guard.intercept_service(lambda _: inner, details)

    def heard(self) -> object:
        """See `Endpoint`: whether this server spoke for the sessions at this moment."""
        return self.is_speaking

    def tells(self, method: str, heard: object, message: Any) -> None:
        """See `Endpoint`: a server that did not speak for the sessions when it was asked tells nothing of them."""
        if heard is False and "OptimizerService" in method and tells_of_state(method, message):
            raise AssertionError(f"{self.process.name} told {method}, and another server speaks")

    def refuses(self, method: str, heard: object, status: Any) -> None:
        """See `Endpoint`: nor does it refuse anything for what it knows of a session."""
        if heard is False and "OptimizerService" in method and (reason := error_from_call(status).reason) in _OF_STATE:
            raise AssertionError(f"{self.process.name} refused {method} with {reason}, and another server speaks")

    def _over(self) -> None:
        self.is_over = True

    def _main(self) -> None:
        clock = self._scheduler.clock
        config = ServerConfig(
            directory=str(self._directory),
            shard=SHARD,
            max_chunk_bytes=_CHUNK_BYTES,
            max_lease_seconds=1e9,
            digest_seconds=2.0,
            **self._settings,
        )
        self.registry = registry = Registry(numpy_pool(), RegistryLimits(100, 100, 1e9), clock)
        self.replication = replication = Replication(config, registry, clock)
        access = AccessControl()
        serving = Serving(Drain(), Inline(), clock, _CHUNK_BYTES, access)  # type: ignore[arg-type]
        local = transport_pb2.LocalAccess()
        service = OptimizerService(
            registry, serving, config, Sharing(None, OFF), instance_id=self.process.name, local=local
        )
        self._handlers = {
            "stepwire.v1.OptimizerService": service.handlers(),
            "stepwire.v1.ReplicationService": ReplicationService(replication).handlers(),
        }
        self._guard, self._role = ErrorInterceptor(told=replication.told), RoleInterceptor(replication.admit)
        announced = ShardDirectory(self._directory)

        def announce(epoch: int) -> None:
            announced.announce(SHARD, epoch, self.target)

        try:
            replication.start(self.target, announce, lambda problem, lives: None, self._over)
        except InvalidRequestError:  # another server speaks: the process ends, as `serve` does
            return
        if replication.epoch:
            announce(replication.epoch)
        self.is_open = True
        while not self.is_over:
            self._scheduler.sleep(1.0)
        self._ended(self)
        self._scheduler.kill(self.process)
