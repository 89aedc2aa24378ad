"""The health of a server, for whoever checks it by gRPC."""

from __future__ import annotations

import threading
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

__all__ = ["HealthStatus"]

_log = structlog.get_logger()
_SERVICE: Final = "stepwire.v1.OptimizerService"


class HealthStatus:
    """The answers to health checks: of the server, and of its service."""

    def __init__(self, server: grpc.Server) -> None:
        """Serve health checks; nothing is SERVING before `serves`."""
        self._health = health.HealthServicer()
        self._problem, self._lock = "", threading.Lock()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    def problem(self) -> str:
        """Return the reason why the server serves no sessions; empty where it does."""
        return self._problem

    def serves(self, problem: str, lives: bool = False) -> None:
        """Say whether the server has sessions to serve, and tell the log why it has none.

        Args:
            problem: the reason why it has none; empty where it serves.
            lives: the process is well all the same, as a standby is: whoever restarts what is not SERVING leaves it.
        """
        with self._lock:
            former, self._problem = self._problem, problem
        if problem != former:
            _log.warning("not serving", reason=problem) if problem else _log.info("serving")
        status = health_pb2.HealthCheckResponse
        self._health.set("", status.NOT_SERVING if problem and not lives else status.SERVING)
        self._health.set(_SERVICE, status.NOT_SERVING if problem else status.SERVING)

    def end(self) -> None:
        """Say NOT_SERVING for the rest of the server's life."""
        self._health.enter_graceful_shutdown()
