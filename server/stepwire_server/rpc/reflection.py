"""gRPC's reflection service, by which tools such as grpcurl ask for the contract: off unless it is turned on."""

from __future__ import annotations

import importlib
from typing import Any, Final

import grpc

from stepwire.errors import UnsupportedFeatureError
from stepwire_server.config import ServerConfig

__all__ = ["add_reflection"]

_SERVICES: Final = ("stepwire.v1.OptimizerService", "grpc.health.v1.Health")


def add_reflection(server: grpc.Server, config: ServerConfig) -> None:
    """Add the service to a server, if its settings ask for it. Its calls are admitted as all others are.

    Raises:
        UnsupportedFeatureError: grpcio-reflection is not installed.
    """
    if not config.reflection:
        return
    try:
        library: Any = importlib.import_module("grpc_reflection.v1alpha.reflection")
    except ImportError:
        raise UnsupportedFeatureError(
            "--reflection needs grpcio-reflection; install it: pip install 'stepwire[reflection]'",
            metadata={"field": "reflection", "feature": "reflection"},
        ) from None
    library.enable_server_reflection((*_SERVICES, library.SERVICE_NAME), server)
