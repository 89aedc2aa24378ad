"""The environment of the process: the only module of the server that reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from stepwire.wire.addresses import unix_path
from stepwire_server.config.parse import ENVIRONMENT_PREFIX, SETTINGS
from stepwire_server.config.settings import ServerConfig

__all__ = [
    "CONFIG_VARIABLE",
    "DEFAULT_TARGET",
    "ENVIRONMENT",
    "beside_target",
    "environment_of",
    "is_setting",
    "kubernetes_variables",
    "named_bind",
    "setting_name",
    "silence_grpc",
]

ENVIRONMENT: Final[Mapping[str, str]] = os.environ
"""The variables of this process, as they are at the moment of reading."""

CONFIG_VARIABLE: Final = "STEPWIRE_CONFIG"
DEFAULT_TARGET: Final = "localhost:50051"

_EVERY_ADDRESS: Final = ("0.0.0.0", "[::]")


def silence_grpc() -> None:
    """Have gRPC write nothing to standard error, unless its own variable says otherwise; call before gRPC is used.

    Strangers cause a line with every handshake that fails, as often as they like.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


# Variables of other parts of the distribution.
_FOREIGN: Final = frozenset(
    (
        CONFIG_VARIABLE,
        "STEPWIRE_CACHE_DIR",
        "STEPWIRE_CLIENT_CONFIG",
        "STEPWIRE_KERNELS",
        "STEPWIRE_TARGET",
        "STEPWIRE_TRANSPORT",
        "STEPWIRE_TOKEN",
        "STEPWIRE_TOKEN_FILE",
        "STEPWIRE_CA",
        "STEPWIRE_CERT",
        "STEPWIRE_CERT_KEY",
    )
)
# Kubernetes makes these in every pod for each Service of the namespace with a name such as "stepwire", and Docker in a
# container with a link (`--link`) to one of such a name. The patterns match whole names, so that a misspelt setting is
# still refused.
_KUBERNETES: Final = re.compile(
    r"STEPWIRE(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?"
    r"|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END|PORT_START|PORT_END))?|ENV_\w+)"
)
_KUBERNETES_PORT: Final = re.compile(r"STEPWIRE(_\w+)?_(PORT|NAME)")
_KUBERNETES_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://|/")  # of a port; Docker's name of a link is a path


def setting_name(variable: str) -> str:
    """Return the name that a variable gives a setting, known or not: "threads" for "STEPWIRE_THREADS"."""
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower()


def is_setting(variable: str, value: str) -> bool:
    """Tell whether a variable speaks of a setting, known or not, and not of Kubernetes or another part."""
    own = variable.startswith(ENVIRONMENT_PREFIX) and variable not in _FOREIGN
    return own and not _is_kubernetes(variable, value)


def kubernetes_variables(environment: Mapping[str, str] = ENVIRONMENT) -> list[str]:
    """Return the variables that look like settings and were made by Kubernetes; they are ignored."""
    return sorted(name for name, value in environment.items() if _is_kubernetes(name, value))


def named_bind(environment: Mapping[str, str] = ENVIRONMENT) -> str:
    """Return the address in the environment for a server; empty for none."""
    return environment.get(SETTINGS["bind"].variable, "")


def beside_target(bind: str) -> str:
    """Return the address of a server for clients on its own machine.

    So the health check of a container asks the server beside it, whatever STEPWIRE_BIND says.

    Args:
        bind: the setting `bind` of the server; empty for the default.
    """
    if unix_path(bind) is not None:
        return bind
    host, _, port = bind.rpartition(":")
    if not host or port == "0":
        return DEFAULT_TARGET
    return f"localhost:{port}" if host in _EVERY_ADDRESS else bind


def environment_of(config: ServerConfig, base: Mapping[str, str] = ENVIRONMENT) -> dict[str, str]:
    """Return an environment by which a process gets exactly these settings.

    Args:
        config: the settings.
        base: the other variables; settings among them are left out.
    """
    environment = {
        name: value
        for name, value in base.items()
        if name != CONFIG_VARIABLE and not is_setting(name, value) and not _is_kubernetes(name, value)
    }
    for name, value in msgspec.structs.asdict(config).items():
        if value is not None:
            environment[SETTINGS[name].variable] = SETTINGS[name].text_of(value)
    return environment


def _is_kubernetes(variable: str, value: str) -> bool:
    if _KUBERNETES.fullmatch(variable):
        return True
    return _KUBERNETES_PORT.fullmatch(variable) is not None and _KUBERNETES_ADDRESS.match(value) is not None
