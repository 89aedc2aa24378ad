"""How the settings of one server become those of several processes that share its machine."""

from __future__ import annotations

import importlib
import os
import pathlib
from typing import Any, NamedTuple

import msgspec

from stepwire.errors import InvalidRequestError
from stepwire.wire.addresses import MAX_UNIX_PATH_BYTES, unix_path
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import default_budget
from stepwire_server.engines.probe import asked_gpus
from stepwire_server.engines.protocol import DeviceInfo
from stepwire_server.host import limits as host

__all__ = ["Machine", "divide", "look_at_machine"]


class Machine(NamedTuple):
    """What there is to divide.

    Attributes:
        processors: that this process may run on.
        memory_bytes: that it may use.
        gpu_memory_bytes: of each visible GPU, by number.
    """

    processors: int
    memory_bytes: int
    gpu_memory_bytes: tuple[int, ...] = ()


def look_at_machine(device: str, cupy: Any = None) -> Machine:
    """Measure this machine, its GPUs only where the setting `device` may use them; no GPU is touched."""
    gpus = () if device == "cpu" else _gpu_memory(cupy)
    return Machine(host.processor_count(), host.memory_bytes(), gpus)


def _gpu_memory(cupy: Any) -> tuple[int, ...]:
    try:
        runtime = (cupy or importlib.import_module("cupy")).cuda.runtime
        return tuple(
            int(runtime.getDeviceProperties(number)["totalGlobalMem"]) for number in range(runtime.getDeviceCount())
        )
    except Exception:  # whatever an installation raises: the processes will look again, and say what is missing
        return ()


def divide(config: ServerConfig, machine: Machine, folder: pathlib.Path) -> list[ServerConfig]:
    """Return the settings of each process.

    Ports follow one another from that of `bind`, or are free ones; a socket's path gets the process's number behind it.
    Threads and budget are a process's share of the machine where the settings leave them open, because each process
    would take all of it; what they name is divided likewise, the threads not below one. Where several GPUs are visible
    they are dealt out, and so are those named.

    Args:
        config: of the whole.
        machine: what there is.
        folder: where sockets lie that nobody named, so that a process that is started again finds its own.

    Raises:
        InvalidRequestError: there are not so many ports or bytes, or a path becomes too long.
    """
    return [_share(config, machine, folder, index) for index in range(config.processes)]


def _share(config: ServerConfig, machine: Machine, folder: pathlib.Path, index: int) -> ServerConfig:
    device, sharers = _device(config, machine, index)
    return msgspec.structs.replace(
        config,
        processes=1,
        bind=_bind(config, index),
        unix_socket=_socket(config, folder, index),
        handoff_socket=_handoff_socket(config, folder, index),
        device=device,
        threads=max((config.threads or machine.processors) // config.processes, 1),
        memory_budget=_budget(config, machine, device, sharers),
        port_file="",
    )


def _bind(config: ServerConfig, index: int) -> str:
    if unix_path(config.bind) is not None:
        return f"{config.bind}.{index}"
    host_name, _, port = config.bind.rpartition(":")
    if not port.isdigit() or not int(port):
        return config.bind
    if int(port) + index > 65535:
        raise InvalidRequestError.of(
            "bind", f"{config.processes} processes need as many ports from {config.bind!r} on; take a lower"
        )
    return f"{host_name}:{int(port) + index}"


def _socket(config: ServerConfig, folder: pathlib.Path, index: int) -> str:
    if config.unix_socket == "off" or unix_path(config.bind) is not None:
        return config.unix_socket
    if config.unix_socket != "auto":
        return f"{config.unix_socket}.{index}"
    return _own_path(folder / f"{index}.sock") or "auto"


def _handoff_socket(config: ServerConfig, folder: pathlib.Path, index: int) -> str:
    if config.handoff_socket:
        return f"{config.handoff_socket}.{index}"
    # Other users have to get there, and the folder is closed to them.
    return "" if config.handoff_uids or not config.shared_memory else _own_path(folder / f"{index}.handoff")


def _own_path(path: pathlib.Path) -> str:
    return str(path) if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES else ""


def _device(config: ServerConfig, machine: Machine, index: int) -> tuple[str, int]:
    """Return a process's device, and how many processes are on it."""
    count = config.processes
    numbers = asked_gpus(config.device) or tuple(range(len(machine.gpu_memory_bytes)))
    if config.device == "cpu" or len(numbers) < 2:
        return config.device, count
    own = numbers[index::count] or (numbers[index % len(numbers)],)
    sharers = sum(other % len(numbers) == index % len(numbers) for other in range(count))
    return ",".join(f"cuda:{number}" for number in own), sharers


def _budget(config: ServerConfig, machine: Machine, device: str, sharers: int) -> int:
    """Return a process's budget on each of its devices; 0, its own default, where it has them for itself."""
    if config.memory_budget:
        if config.memory_budget < sharers:
            raise InvalidRequestError.of(
                "memory_budget", f"{config.memory_budget} bytes for {sharers} processes; give more"
            )
        return config.memory_budget // sharers
    if sharers == 1:
        return 0
    gpus = asked_gpus(device) or ((0,) if device != "cpu" and machine.gpu_memory_bytes else ())
    sizes = [machine.gpu_memory_bytes[number] for number in gpus if number < len(machine.gpu_memory_bytes)]
    if device == "auto" or not sizes:  # it may come to the CPU
        sizes.append(machine.memory_bytes)
    return default_budget(DeviceInfo(device, "", min(sizes) // sharers))
