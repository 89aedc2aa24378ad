"""The server's settings: one frozen record, checked at the edge, and the one place that reads the environment.

Precedence: command-line flag > environment `STEPWIRE_*` > TOML file > default.
"""

from __future__ import annotations

import os
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from stepwire.errors import InvalidRequestError

__all__ = ["ENVIRONMENT_PREFIX", "MIB", "ServerConfig", "environment_of", "load_config"]

ENVIRONMENT_PREFIX = "STEPWIRE_"
MIB = 1 << 20

# Read by other parts of the distribution, so not settings of the server.
_FOREIGN_VARIABLES = {
    "STEPWIRE_CACHE_DIR",
    "STEPWIRE_CONFIG",
    "STEPWIRE_KERNELS",
    "STEPWIRE_TARGET",
    "STEPWIRE_TRANSPORT",
}

_Positive = Annotated[int, Meta(ge=1)]
_Seconds = Annotated[float, Meta(gt=0, le=1e9)]  # thirty years; dates and waits end before infinity


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a server runs.

    Attributes:
        bind: address to listen on, `host:port`; port 0 takes a free one. Or `unix:/path`: a Unix socket alone.
        unix_socket: a Unix socket to listen on besides the port, for clients on the same machine: its path; `auto` for
            one in a private folder, which they are told; `off` for none.
        processes: server processes, each with sessions, budget, threads and addresses of its own.
        device: where state lives: `cpu`; `cuda` for every GPU that works; GPUs by number, such as `cuda:0` or
            `cuda:0,cuda:2`, which all must work; `auto` for `cuda` where a GPU works, else `cpu`.
        threads: CPU threads of the engine; 0 means one a core.
        max_sessions: sessions at a time.
        memory_budget_bytes: bytes that sessions may hold on each device; 0 means 80 % of its memory (of a
            GPU's, of what is free at start).
        gpu_bus_slots: pieces that may be on a GPU's bus at a time, each way: 3 to 64.
        gpu_bus_slot_bytes: bytes of each, 64 KiB to 256 MiB, pinned on the host and held on the device.
        gpu_gradient_cache_bytes: memory for gradients that a GPU keeps from one step to the next, until memory is short
            or no step comes; 0 means a sixteenth of what is free at start.
        max_streams: attached streams at a time; each costs a thread.
        max_tensors: tensors in a session.
        max_chunk_bytes: payload of one message, 64 KiB to 64 MiB.
        max_lease_seconds: longest and default life of an unused session.
        step_idle_seconds: silence inside a step before its stream is dropped.
        drain_seconds: how long steps under way may take after SIGTERM.
        sweep_seconds: pause between two looks for expired sessions and silent streams.
        insecure: allow plaintext on an address that is not loopback.
        shared_memory: share memory with clients on this machine.
        cuda_ipc: share memory of a GPU with clients on it, by CUDA IPC.
        handoff_socket: the Unix socket that hands it over: its path; empty for one in a private folder, which clients
            are told. Containers that share a volume name one there.
        handoff_uids: users that may share memory besides the server's own and root: numbers, with commas between.
        port_file: where to write the port once listening, 0 without one, of several processes a line each; empty for
            nowhere.
        parent_pid: process that started this one, and at whose end it drains too; 0 for none.
        log_level: least level logged.
        log_json: log lines as JSON; unset means when standard output is not a terminal.
    """

    bind: str = "127.0.0.1:50051"
    unix_socket: Annotated[str, Meta(pattern=r"^(auto|off|/.+)$")] = "auto"
    processes: Annotated[int, Meta(ge=1, le=1024)] = 1
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3})*)$")] = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0
    max_sessions: _Positive = 1024
    memory_budget_bytes: Annotated[int, Meta(ge=0)] = 0
    gpu_bus_slots: Annotated[int, Meta(ge=3, le=64)] = 4
    gpu_bus_slot_bytes: Annotated[int, Meta(ge=64 << 10, le=256 * MIB)] = 8 * MIB
    gpu_gradient_cache_bytes: Annotated[int, Meta(ge=0)] = 0
    max_streams: _Positive = 256
    max_tensors: _Positive = 65536
    max_chunk_bytes: Annotated[int, Meta(ge=64 << 10, le=64 * MIB)] = 4 * MIB
    max_lease_seconds: _Seconds = 3600.0
    step_idle_seconds: _Seconds = 60.0
    drain_seconds: _Seconds = 30.0
    sweep_seconds: _Seconds = 1.0
    insecure: bool = False
    shared_memory: bool = True
    cuda_ipc: bool = True
    handoff_socket: Annotated[str, Meta(pattern=r"^(/.+)?$")] = ""
    handoff_uids: Annotated[str, Meta(pattern=r"^([0-9]{1,10}(,[0-9]{1,10})*)?$")] = ""
    port_file: str = ""
    parent_pid: Annotated[int, Meta(ge=0)] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool | None = None


def load_config(
    flags: Mapping[str, Any], *, environment: Mapping[str, str] = os.environ, file: pathlib.Path | None = None
) -> ServerConfig:
    """Merge flags, environment, file and defaults.

    Args:
        flags: by field name; None means not given.
        environment: variables `STEPWIRE_<FIELD>`.
        file: a TOML file whose keys are field names.

    Raises:
        InvalidRequestError: an unknown name, or a value of the wrong type or out of range.
    """
    path = file or (pathlib.Path(environment["STEPWIRE_CONFIG"]) if environment.get("STEPWIRE_CONFIG") else None)
    sources: dict[str, Mapping[str, Any]] = {
        "file": _from_file(path) if path else {},
        "environment": _from_environment(environment),
        "flags": {name: value for name, value in flags.items() if value is not None},
    }
    values = {name: value for source in sources.values() for name, value in source.items()}
    try:
        return msgspec.convert(values, ServerConfig, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(f"settings: {error}{_told(str(error), sources)}") from None


def environment_of(config: ServerConfig, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment by which a process gets exactly these settings, whatever `base` says of them."""
    environment = {name: value for name, value in base.items() if _field_of(name) is None}
    environment.pop("STEPWIRE_CONFIG", None)
    for name, value in msgspec.structs.asdict(config).items():
        if value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            environment[ENVIRONMENT_PREFIX + name.upper()] = text
    return environment


def _field_of(variable: str) -> str | None:
    """Return the setting that a variable is of; None if it is of none, or of others."""
    if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _FOREIGN_VARIABLES:
        return None
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower()


def _from_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(f"settings file {str(path)!r}: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {field.name: field.name for field in msgspec.structs.fields(ServerConfig)}
    values: dict[str, Any] = {}
    for name, value in environment.items():
        if (asked := _field_of(name)) is None:
            continue
        if (field := known.get(asked)) is None:
            allowed = ", ".join(sorted(ENVIRONMENT_PREFIX + known_name.upper() for known_name in known))
            raise _invalid(f"environment variable {name} is unknown; use one of: {allowed}")
        values[field] = value
    return values


def _told(problem: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a refused setting was and where it came from: of several places, the one that wins."""
    named = re.search(r"\$\.(\w+)", problem)
    name = named[1] if named else ""
    places = {"file": f"the file's {name}", "environment": ENVIRONMENT_PREFIX + name.upper(), "flags": f"flag {name}"}
    for source in reversed(list(sources)):
        if name in sources[source]:
            return f": {places[source]} is {sources[source][name]!r}; `stepwire serve --help` lists the flags"
    return ""


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, metadata={"field": "settings"})
