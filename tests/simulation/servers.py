"""The server processes of one shard: real sessions, log and checkpoints, on a simulated disk.

One data directory has one owner at a time, and perhaps older ones that are paused, or that have not noticed yet.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.errors import FencedError, Reason
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import transport_pb2
from stepwire.wire.error_details import error_from_call
from stepwire.wire.frames import read_frame
from stepwire_server.access.control import AccessControl
from stepwire_server.config import ServerConfig
from stepwire_server.rpc.attach import Serving
from stepwire_server.rpc.drain import Drain
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.rpc.interceptor import ErrorInterceptor
from stepwire_server.rpc.servicer import OptimizerService
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits
from stepwire_server.sharing.offer import Sharing
from tests.simulation.disks import SharedDisk, SimulatedDisk
from tests.simulation.runtime import Process, Scheduler
from tests.support.numpy_server import numpy_pool

__all__ = ["OFF", "Details", "Inline", "SimulatedServer", "parameters_of", "tells_of_state"]

_CHUNK_BYTES: Final = 4096
_OF_STATE: Final = (
    Reason.SESSION_NOT_FOUND,
    Reason.STEP_MISMATCH,
    Reason.STALE_EPOCH,
    Reason.FENCED,
    Reason.STATE_LOST,
    Reason.DURABLE_STEP_LOST,
    Reason.DURABILITY_FAILED,
    Reason.INTERNAL,
)
_SWEEP_SECONDS: Final = 0.25


class Inline:
    """An executor that runs in the task of its caller."""

    def submit(self, call: Callable[..., Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)
        return future


class Details(NamedTuple):
    method: str
    invocation_metadata: tuple[()] = ()


OFF = dict.fromkeys(
    (transport_pb2.TRANSPORT_SHM, transport_pb2.TRANSPORT_CUDA_IPC, transport_pb2.TRANSPORT_PACKETS), "off"
)


class SimulatedServer:
    """One server process, from its start to its end.

    Attributes:
        shard: the number of the shard.
        process: the process.
        is_open: it accepts connections.
        registry: its sessions; None before they are there.
        epoch: its epoch; 0 before it has one.
    """

    def __init__(self, scheduler: Scheduler, shared: SharedDisk, shard: int, incarnation: int) -> None:
        self.shard, self.process = shard, Process(f"shard {shard}.{incarnation}")
        self.is_open = False
        self.registry: Registry | None = None
        self.epoch = 0
        self._scheduler, self._shared = scheduler, shared
        self._disk = SimulatedDisk(shared, scheduler, self.process)
        self._handlers: Any = None
        self._guard = ErrorInterceptor()
        self._calls_left = 0
        self._disk.before = self._disk_call

    def start(self, recovered: Callable[[SimulatedServer], object]) -> None:
        """Start; `recovered` is called once the sessions are back, before anything is served."""
        self._scheduler.spawn(lambda: self._main(recovered), self.process, "main")

    @property
    def is_parked(self) -> bool:
        """Tell whether sessions are on its disk alone."""
        return self.registry is not None and bool(self.registry._parked)

    @property
    def is_newest(self) -> bool:
        """Tell whether no newer server has claimed its directory."""
        return self._newest_epoch() == self.epoch

    def die_after(self, calls: int) -> None:
        """Have the process killed at one of its next calls of the disk."""
        self._calls_left = calls

    def handler(self, method: str) -> Any:
        """See `Endpoint`."""
        return self._guard.intercept_service(self._handlers.service, Details(method))  # type: ignore[arg-type]

    def heard(self) -> object:
        """See `Endpoint`: the newest epoch at this moment."""
        return self._newest_epoch()

    def tells(self, method: str, heard: object, message: Any) -> None:
        """See `Endpoint`: an owner that was not the newest when it was asked tells nothing of a session's state."""
        if heard != self.epoch and tells_of_state(method, message):
            raise AssertionError(f"{self.process.name} of epoch {self.epoch} answered {method} asked in epoch {heard}")

    def refuses(self, method: str, heard: object, status: Any) -> None:
        """See `Endpoint`: nor does it refuse anything for what it knows of a session, or for its disk."""
        if heard is not None and heard != self.epoch and (reason := error_from_call(status).reason) in _OF_STATE:
            raise AssertionError(f"{self.process.name} of epoch {self.epoch} refused {method} with {reason}")

    def _newest_epoch(self) -> int:
        return max(int(name, 16) for name in os.listdir(self._shared.folder / "epochs"))

    def _disk_call(self, name: str, path: pathlib.Path | None) -> None:
        if self._calls_left:
            self._calls_left -= 1
            if not self._calls_left:
                self._scheduler.kill(self.process)

    def _main(self, recovered: Callable[[SimulatedServer], object]) -> None:
        clock = self._scheduler.clock
        config = ServerConfig(
            data_dir=str(self._shared.folder),
            max_chunk_bytes=_CHUNK_BYTES,
            max_lease_seconds=1e9,
            sweep_seconds=_SWEEP_SECONDS,
            checkpoint_seconds=1.0,
            journal_segment_bytes=1 << 16,
        )
        pool = numpy_pool()
        try:
            directory = DataDirectory(config, DurableCodec(), clock, self._disk)
        except FencedError:  # overtaken at the start: the process ends, as `serve` does
            return
        self.epoch = directory.epoch
        self.registry = Registry(pool, RegistryLimits(100, 100, 1e9), clock)
        self.registry.recover(directory)
        recovered(self)
        serving = Serving(Drain(), Inline(), clock, _CHUNK_BYTES, AccessControl())  # type: ignore[arg-type]
        service = OptimizerService(
            self.registry,
            serving,
            config,
            Sharing(None, OFF),
            instance_id=self.process.name,
            local=transport_pb2.LocalAccess(),
        )
        self._handlers, self._guard = service.handlers(), ErrorInterceptor(told=directory.own.told)
        directory.start()
        self.is_open = True
        while True:
            self._scheduler.sleep(_SWEEP_SECONDS)
            self.registry.sweep()


def parameters_of(server: SimulatedServer, size: int) -> npt.NDArray[np.float32] | None:
    """Return the parameters of a server's only session as they are now; None without a session that has some.

    They are read without the session's lock: nothing else runs meanwhile, and no commit rests half-way.
    """
    sessions = [] if server.registry is None else list(server.registry._sessions.values())
    if not sessions or not sessions[0].ledger.ready or sessions[0].ledger.closed:
        return None
    values = np.empty(size, np.float32)
    sessions[0]._state.read("param", 0, values)
    return values


def tells_of_state(method: str, message: Any) -> bool:
    name = method.rpartition("/")[2]
    if name == "Attach":
        reply: Any = read_frame(pb.AttachResponse, message).message
        return bool(reply.HasField("opened") or reply.HasField("result"))
    if name == "Pull":
        return bool(read_frame(pb.PullResponse, message).message.HasField("header"))
    return name in ("Load", "Step", "CreateSession", "GetSession", "DeleteSession")
