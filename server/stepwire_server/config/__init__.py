"""The settings of the server, and the one room that reads the environment.

`hosting` and `settings` have the fields, within `constraints`. `parse` reads a value, `environment` knows the
variables, and `load` merges all sources.
"""

from __future__ import annotations

from stepwire_server.config.environment import (
    DEFAULT_TARGET,
    ENVIRONMENT,
    beside_target,
    environment_of,
    kubernetes_variables,
    named_bind,
    silence_grpc,
)
from stepwire_server.config.load import load_config
from stepwire_server.config.parse import ENVIRONMENT_PREFIX
from stepwire_server.config.settings import MIB, ServerConfig

__all__ = [
    "DEFAULT_TARGET",
    "ENVIRONMENT",
    "ENVIRONMENT_PREFIX",
    "MIB",
    "ServerConfig",
    "beside_target",
    "environment_of",
    "kubernetes_variables",
    "load_config",
    "named_bind",
    "silence_grpc",
]
