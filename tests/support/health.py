"""The health of a server, as a check by gRPC is told."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepwire_server.server import Server

__all__ = ["health_of"]


def health_of(server: Server, service: str = "stepwire.v1.OptimizerService") -> str:
    """Return the name of the status of a service; of the empty one it is the server's."""
    with grpc.insecure_channel(server.target) as channel:
        found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(found.status))
