"""The wiring of a server: from settings to a server that runs, and from SIGTERM to a clean end."""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, NamedTuple, cast

import grpc
import structlog

from stepwire.errors import DataLossError, InvalidRequestError, Reason, StepwireError, UnavailableError
from stepwire.host.threads import DaemonThreads
from stepwire.version import __version__
from stepwire_server.access.configured import access_of
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.devices.starting import start_devices
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.object_store import ObjectStoreError
from stepwire_server.host.heap import HeapKeeper
from stepwire_server.host.memory_guard import MemoryGuard
from stepwire_server.monitoring.monitoring import Monitoring
from stepwire_server.processes.announcement import announce, check_announced, endpoint_of
from stepwire_server.processes.port_file import write_ports
from stepwire_server.processes.standby_settings import check_replication
from stepwire_server.records.session_statistics import RegistryStatistics
from stepwire_server.rpc.call_rooms import MOST_CALLS, CallRooms, CallStatistics
from stepwire_server.rpc.channel_options import channel_options, largest_message_bytes
from stepwire_server.rpc.drain import Drain, DrainStatistics
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.rpc.health_status import HealthStatus
from stepwire_server.rpc.interceptors import interceptors
from stepwire_server.rpc.lane_gate import LaneGate
from stepwire_server.rpc.listen import Listening, check_bind, check_free
from stepwire_server.rpc.reflection import add_reflection
from stepwire_server.rpc.replicating import Replication
from stepwire_server.rpc.replication_service import ReplicationService
from stepwire_server.rpc.servicer import OptimizerService
from stepwire_server.rpc.serving import Serving
from stepwire_server.rpc.share_memory import HostSharing
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.parked import durable_steps
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import limits_of
from stepwire_server.sessions.streams import RETURNING_STREAMS
from stepwire_server.sharing.handoff import HandoffStatistics

__all__ = ["Server", "ServerStatistics"]

_log = structlog.get_logger()

# Threads for calls that have just lost their place, or are refused; gRPC itself refuses a call only in a flood.
_LEAVING_CALLS: Final = 64
_MOST_PENDING_CALLS: Final = 8192
_LAST_REPLY_SECONDS: Final = 0.25
_STREAM_END_SECONDS: Final = 2.0
_SILENT_SHARE: Final = 0.5
_MOST_ANNOUNCED: Final = 1000


class ServerStatistics(NamedTuple):
    """The state of a server.

    Attributes:
        drain: the steps under way, and the refusal of new ones.
        registry: the sessions, streams and bytes.
        handoff: the memory that waits for clients on this machine.
        calls: the calls under way.
    """

    drain: DrainStatistics
    registry: RegistryStatistics
    handoff: HandoffStatistics
    calls: CallStatistics


class Server:
    """A stepwire server in this process. A context manager; closes twice without complaint.

    Attributes:
        registry: the sessions.
        access: the admission of calls.
        target: the address for clients: `host:port`, or `unix:/path` without a port.
        port: the TCP port; 0 without a port.
        unix_socket: the path of the Unix socket; empty without a socket.
        lanes: the gate of compiled lanes.
        handoff: the memory that is shared with processes of this machine, or the reason why none is.
        monitoring: the addresses for whoever watches.
        replication: the role of this server beside a standby or a primary.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        pool: DevicePool | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Choose the devices and listen; nothing is served before `start`.

        Args:
            config: the settings.
            clock: the clock of leases, idle times and telemetry, in seconds; tests pass their own.
            pool: the devices, closed with the server; None starts the devices that `config` names.
            disk: the system calls of the data directory; tests and benchmarks pass their own.

        Raises:
            InvalidRequestError: an address is taken, not understood, or not loopback without `insecure`; or settings do
                not go together.
            UnsupportedFeatureError: a device is missing, or does not work.
        """
        for check in (check_bind, check_announced, check_replication):
            check(config)
        self._config, self.monitoring = config, Monitoring(config)
        self._pool = pool or start_devices(config)
        self._drain, self._closed = Drain(), False
        self.lanes = LaneGate(enabled=config.compiled_lanes and not self.monitoring.traces)
        self.registry = Registry(self._pool, limits_of(config), clock, self.monitoring.sinks)
        with closed_on_failure(self._pool):
            check_free(config)  # before a data directory is acquired, which the server that listens there may own
            self._certificates, self.access = access_of(config)
            self._directory = _data_directory(config, clock, disk)
            if self._directory is not None:
                self.registry.recover(self._directory)
        self.replication = Replication(config, self.registry, clock)
        # One for each stream: a line for threads would be another order than that of turns, which are fair.
        self._commit_threads = DaemonThreads(config.max_streams + RETURNING_STREAMS, "commit")
        self._rooms = CallRooms(clock, config.step_idle_seconds, message_bytes=largest_message_bytes(config))
        self._memory = MemoryGuard(self._relieve, config.memory_limit)
        self._handlers = DaemonThreads(config.max_streams + RETURNING_STREAMS + MOST_CALLS + _LEAVING_CALLS, "call")
        self._grpc = grpc.server(
            cast(Any, self._handlers),  # gRPC uses nothing that other executors have not
            interceptors=interceptors(
                self.access, self._rooms, self.monitoring, self._told, self.replication.admit, clock
            ),
            options=channel_options(config),
            maximum_concurrent_rpcs=_MOST_PENDING_CALLS,
        )
        self._stopped, self._lost = threading.Event(), threading.Event()
        self._tell_lost: Callable[[], None] = lambda: None
        self._sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self._listening: Listening | None = None
        self._host_sharing: HostSharing | None = None
        listening, self.handoff = self._listen(clock)
        self.port, self.target, self.unix_socket = listening.port, listening.target, listening.unix_socket
        self._endpoint = endpoint_of(config, self.target, self.port)
        self._health = HealthStatus(self._grpc)
        self._grpc.add_generic_rpc_handlers(self._services(clock))
        self._pool.on_lost(self._device_lost)
        self.access.on_change(self.registry.streams.check)
        _open.add(self)

    def start(self) -> None:
        """Serve from now on."""
        self.handoff.start()
        self.replication.start(self._endpoint, self._announce, self._health.serves, self._lose)
        self._grpc.start()
        self.monitoring.start()
        self._sweeper.start()
        self._memory.start()
        if self._directory is not None:
            self._directory.start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()
        if self._directory is not None or self.replication.epoch:
            self._announce(self.replication.epoch if self._directory is None else self._directory.epoch)
        if self._config.port_file:
            write_ports(pathlib.Path(self._config.port_file), [self.port])
        _log.info(
            "listening",
            target=self.target,
            unix_socket=self.unix_socket,
            version=__version__,
            pid=os.getpid(),
            tls=self._certificates is not None,
            tokens=bool(self._config.tokens),
            shared_memory=self.handoff.off or "on",
        )

    def drain(self) -> bool:
        """Refuse new steps and wait for the steps under way.

        A step whose client is silent for half of that time is dropped: it has no commit, and leaves no trace.
        The last replies then get a moment to leave: a stream that is cancelled loses bytes that are still on their way.
        Then a standby is promoted in its place. At last durable sessions and the object store get what they have not.

        Returns:
            True if every step ended within `drain_seconds`, every checkpoint was taken, and every upload ended within
            `drain_seconds`.
        """
        self._refuse_steps()
        patience = self._config.drain_seconds * _SILENT_SHARE
        self.registry.streams.hurry(patience)
        self._rooms.hurry(patience)
        self._health.end()
        _log.info("draining", seconds=self._config.drain_seconds)
        empty = self._drain.wait(self._config.drain_seconds)
        self._stopped.wait(_LAST_REPLY_SECONDS)
        self.replication.hand_over(self._config.drain_seconds)
        saved = self.registry.checkpoint_all()
        stored = self._directory is None or self._directory.settle(self._config.drain_seconds)
        return saved and stored and empty

    def hasten(self) -> None:
        """Have `drain` wait no longer for the steps under way."""
        self._drain.hasten()

    def _refuse_steps(self) -> None:
        """Refuse new steps, and have no worker wait for others, who would be refused."""
        self._drain.start()
        self.lanes.close()
        self.registry.end_waits(self._drain.refusal())

    def close(self) -> None:
        """Stop at once: end the steps under way and free everything. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._refuse_steps()
        self._stopped.set()
        self._memory.close()
        stopped = self._grpc.stop(_STREAM_END_SECONDS)
        self.registry.streams.cancel()
        stopped.wait()
        self.replication.close()
        if self._listening is not None:
            self._listening.close()
        self.monitoring.close()
        self._handlers.shutdown()
        self._commit_threads.shutdown()
        if self._host_sharing is not None:
            self._host_sharing.close()
        if self._directory is not None:
            self._directory.checkpointer.close()
        self.registry.close()
        if self._directory is not None:
            self._directory.close()
        self._pool.close()
        _log.info("stopped")

    @property
    def lost(self) -> bool:
        """True once only a new process serves: a device has failed for good, or another server has the sessions."""
        return self._lost.is_set()

    def on_lost(self, tell: Callable[[], None]) -> None:
        """Call `tell` once this server is `lost`, in the thread that finds out; at once if it is."""
        self._tell_lost = tell
        if self.lost:
            tell()

    def statistics(self) -> ServerStatistics:
        """Return the state as of now."""
        return ServerStatistics(
            self._drain.statistics(),
            self.registry.statistics(),
            self.handoff.statistics(),
            self._rooms.statistics(),
        )

    def __enter__(self) -> Server:
        """Start for a block; a server that cannot start is closed."""
        with self._closed_by_errors():
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @contextlib.contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _listen(self, clock: Callable[[], float]) -> tuple[Listening, HostSharing]:
        with self._closed_by_errors():
            self.monitoring.replication = self.replication.status
            self.monitoring.listen(self.registry, self.access, lambda: self._drain.started, self._certificates)
            self._listening = listening = Listening(self._grpc, self._config, self._certificates)
            self._host_sharing = sharing = HostSharing(self._config, clock, [device.name for device in self._pool])
            add_reflection(self._grpc, self._config)
        return listening, sharing

    def _services(self, clock: Callable[[], float]) -> tuple[grpc.GenericRpcHandler, ...]:
        most, sinks, problem = self._config.max_chunk_bytes, self.monitoring.reply_sinks, self._health.problem
        serving = Serving(self._drain, self._commit_threads, clock, most, self.access, sinks, problem, self.lanes)
        local, instance = self.handoff.local_access(self.unix_socket), secrets.token_hex(8)
        steps = OptimizerService(
            self.registry, serving, self._config, self.handoff.sharing, instance_id=instance, local=local
        )
        return steps.handlers(), ReplicationService(self.replication).handlers()

    def _told(self, error: StepwireError) -> StepwireError:
        """Return the error that a caller may be told: an owner that was overtaken knows nothing of the sessions."""
        directory = self.registry.directory
        if directory is None:
            return self.replication.told(error)
        if (told := directory.own.told(error)).reason is Reason.NOT_PRIMARY:
            self._health.serves(str(told))
        return told

    def _announce(self, epoch: int) -> None:
        announce(self._config, epoch, self._endpoint, durable_steps(self.registry.page("", _MOST_ANNOUNCED)[0]))

    def _device_lost(self, error: DataLossError) -> None:
        _log.error("device lost; this process has to end", problem=str(error), **error.metadata)
        self._health.end()
        self._lose()

    def _lose(self) -> None:
        self._lost.set()
        self._tell_lost()

    def _sweep(self) -> None:
        keeper = HeapKeeper()
        while not self._stopped.wait(self._config.sweep_seconds):
            try:
                self.access.look()
                self._look_at_owner()
                self._rooms.end_silent()
                for session_id in self.registry.sweep():
                    _log.info("lease ran out", session_id=session_id)
                if keeper.look(self._pool.released_bytes):
                    self._pool.rest()
            except Exception:  # a broken device must not keep the other leases from running out
                _log.exception("sweep failed")

    def _relieve(self) -> int:
        """End whatever may hold a part of a message: whoever has waited for one for longer than messages take."""
        return self.registry.streams.end_waiting() + self._rooms.end_slow()

    def _look_at_owner(self) -> None:
        """Say that this server serves nothing, if another one owns its data directory by now."""
        if self._directory is not None and not self._directory.own.holds():
            self._health.serves("another server owns the data directory now; connect to that one")

    def _warm_up(self) -> None:
        try:
            self._pool.warm_up()
        except Exception as problem:  # sessions meet the same problem, and tell it to their clients
            _log.warning("kernels could not be compiled ahead", problem=str(problem))


_open: weakref.WeakSet[Server] = weakref.WeakSet()


def _close_all() -> None:
    """Close the servers that the program has left open, at its end."""
    for server in list(_open):
        server.close()


# Registered with the import: functions that a program registers later run before, and find its servers at work.
atexit.register(_close_all)


def _data_directory(config: ServerConfig, clock: Callable[[], float], disk: Disk | None) -> DataDirectory | None:
    if config.checkpoint_store and not config.data_dir:
        raise InvalidRequestError.of("checkpoint_store", "it has copies of a data directory; give --data-dir too")
    try:
        return DataDirectory(config, DurableCodec(), clock, disk) if config.data_dir else None
    except ObjectStoreError as error:
        raise UnavailableError(
            f"the object store of the checkpoints failed: {error}; nothing is served without it, so start again when "
            "it answers",
            reason=Reason.UNREACHABLE,
        ) from error
