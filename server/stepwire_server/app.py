"""Wiring: from settings to a running server, and from SIGTERM to a clean end."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stepwire.errors import InvalidRequestError
from stepwire.transport_options import BULK_OPTIONS
from stepwire_server.config import MIB, ServerConfig
from stepwire_server.engines import CudaOptions, choose_engines
from stepwire_server.gate import Gate
from stepwire_server.heap import HeapKeeper
from stepwire_server.interceptor import ErrorInterceptor
from stepwire_server.places import Places
from stepwire_server.registry import Registry
from stepwire_server.service import OptimizerService

__all__ = ["Server"]

_log = structlog.get_logger()

# Calls that are no attached streams; above both together gRPC refuses with RESOURCE_EXHAUSTED at once.
_UNARY_CALLS: Final = 64
_MESSAGE_HEADROOM: Final = 1 * MIB
_LARGEST_CREATE_BYTES: Final = 32 * MIB
_LAST_ANSWER_SECONDS: Final = 0.25
_STREAM_END_SECONDS: Final = 2.0


class Server:
    """A stepwire server in this process. A context manager; closes twice without complaint."""

    def __init__(
        self, config: ServerConfig, *, clock: Callable[[], float] = time.monotonic, places: Places | None = None
    ) -> None:
        """Choose the devices and listen; nothing is served before `start`.

        Args:
            config: how to run.
            clock: what leases, idle times and telemetry go by; tests pass their own.
            places: the devices, closed with the server; None to start those that `config` says.

        Raises:
            InvalidRequestError: the address is taken, not understood, or not loopback without `insecure`.
            UnsupportedFeatureError: a device is not there, or does not work.
        """
        self._config = config
        self._host = _checked_host(config)
        self._places = places or _started_places(config)
        self._gate = Gate()
        self.registry = Registry(
            self._places,
            max_sessions=config.max_sessions,
            max_streams=config.max_streams,
            step_idle_seconds=config.step_idle_seconds,
            clock=clock,
        )
        self._workers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="commit")
        calls = config.max_streams + _UNARY_CALLS
        self._handlers = ThreadPoolExecutor(calls, thread_name_prefix="call")
        self._grpc = grpc.server(
            self._handlers,
            interceptors=[ErrorInterceptor()],
            options=_options(config),
            maximum_concurrent_rpcs=calls,
        )
        service = OptimizerService(self.registry, self._gate, self._workers, config, secrets.token_hex(8))
        self._grpc.add_generic_rpc_handlers((service.handlers(),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._stopped = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self._closed = False
        self.port = self._listen()

    @property
    def target(self) -> str:
        """Where clients connect: `host:port`."""
        return f"{self._host}:{self.port}"

    def start(self) -> None:
        """Serve."""
        self._grpc.start()
        self._sweeper.start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()
        for name in ("", "stepwire.v1.OptimizerService"):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._config.port_file:
            _write_port(pathlib.Path(self._config.port_file), self.port)
        _log.info("listening", target=self.target)

    def drain(self) -> bool:
        """Refuse new steps and wait for those under way; False if some outlast `drain_seconds`.

        The last answers then get a moment to leave: a stream that is cancelled loses what is still on its way.
        """
        self._gate.close()
        self._health.enter_graceful_shutdown()
        _log.info("draining", seconds=self._config.drain_seconds)
        empty = self._gate.wait_empty(self._config.drain_seconds)
        self._stopped.wait(_LAST_ANSWER_SECONDS)
        return empty

    def close(self) -> None:
        """Stop at once: cut what is under way and free everything."""
        if self._closed:
            return
        self._closed = True
        self._gate.close()
        self._stopped.set()
        stopped = self._grpc.stop(_STREAM_END_SECONDS)
        self.registry.cancel_streams()
        stopped.wait()
        self._handlers.shutdown()
        self._workers.shutdown()
        self.registry.close()
        self._places.close()
        _log.info("stopped")

    def __enter__(self) -> Server:
        """Start for a block."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _listen(self) -> int:
        try:
            port = self._grpc.add_insecure_port(self._config.bind)
        except RuntimeError:
            port = 0
        if port == 0:
            self.close()
            raise InvalidRequestError(
                f"bind: cannot listen on {self._config.bind!r}: the port is taken or the address is not this "
                "machine's; choose another with --bind host:port (port 0 takes a free one)",
                metadata={"field": "bind"},
            )
        return port

    def _sweep(self) -> None:
        keeper = HeapKeeper()
        while not self._stopped.wait(self._config.sweep_seconds):
            for session_id in self.registry.sweep():
                _log.info("lease ran out", session_id=session_id)
            if keeper.look(self._places.released_bytes):
                self._places.rest()

    def _warm_up(self) -> None:
        try:
            self._places.warm_up()
        except Exception as problem:  # what is wrong then is wrong for sessions too, and they say it to their clients
            _log.warning("kernels could not be compiled ahead", problem=str(problem))


def _started_places(config: ServerConfig) -> Places:
    """Start what the settings say, and log what that is and why."""
    options = CudaOptions(config.gpu_bus_slots, config.gpu_bus_slot_bytes, config.gpu_gradient_cache_bytes)
    choice = choose_engines(config.device, config.threads or None, options=options)
    places = Places.of(choice.engines, config.memory_budget_bytes)
    _log.info("devices chosen", devices=", ".join(place.name for place in places), why=choice.why)
    for place in places:
        _log.info(
            "device",
            name=place.name,
            description=place.engine.device.description,
            memory_bytes=place.engine.device.memory_bytes,
            budget_bytes=place.budget.limit_bytes,
        )
    return places


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    largest = max(config.max_chunk_bytes + _MESSAGE_HEADROOM, _LARGEST_CREATE_BYTES)
    return [
        *BULK_OPTIONS,
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _checked_host(config: ServerConfig) -> str:
    host, separator, port = config.bind.rpartition(":")
    # gRPC takes a port modulo 65536.
    if not separator or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidRequestError(f"bind: {config.bind!r} is not host:port", metadata={"field": "bind"})
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not config.insecure:
        raise InvalidRequestError(
            f"bind: {config.bind!r} is not a loopback address and the connection is not encrypted: gradients and "
            "session ids would travel in the clear. Put a TLS proxy in front, or accept it with --insecure",
            metadata={"field": "bind"},
        )
    return host


def _write_port(path: pathlib.Path, port: int) -> None:
    """Write whole or not at all, so that a reader that sees the file sees the port."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f"{port}\n")
    temporary.replace(path)
