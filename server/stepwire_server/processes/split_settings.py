"""The settings of several processes, made from the settings of one server and the machine that they share."""

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
from stepwire_server.processes.announcement import check_announced
from stepwire_server.processes.standby_settings import check_replication

__all__ = ["Machine", "divide", "look_at_machine"]


class Machine(NamedTuple):
    """The resources of a machine.

    Attributes:
        processors: the number of processors that this process may run on.
        memory_bytes: the memory that this process may use, in bytes.
        gpu_memory_bytes: the memory of each visible GPU in bytes, by the number of the GPU.
    """

    processors: int
    memory_bytes: int
    gpu_memory_bytes: tuple[int, ...] = ()


def look_at_machine(device: str, cupy: Any = None) -> Machine:
    """Measure this machine, and its GPUs only if the setting `device` may use them; no GPU is touched."""
    gpus = () if device == "cpu" else _gpu_memory(cupy)
    return Machine(host.processor_count(), host.memory_bytes(), gpus)


def _gpu_memory(cupy: Any) -> tuple[int, ...]:
    try:
        runtime = (cupy or importlib.import_module("cupy")).cuda.runtime
        return tuple(
            int(runtime.getDeviceProperties(number)["totalGlobalMem"]) for number in range(runtime.getDeviceCount())
        )
    except Exception:  # an installation may raise anything; the processes look again, and name the problem
        return ()


def divide(config: ServerConfig, machine: Machine, folder: pathlib.Path) -> list[ServerConfig]:
    """Return the settings of each process.

    Ports count up from the port of `bind`, or are free ones. The path of a socket gets the number of the process as its
    suffix, and the data directory and the object store have a folder for each. Threads, budget and memory are divided
    among the processes: those of the settings, or else those of the machine.
    Each process has one thread at least. GPUs are dealt out: those of the settings, or else all visible ones.

    Args:
        config: the settings of the whole server.
        machine: the resources to divide.
        folder: the folder of sockets without a name, so that a process that is started again finds its own.

    Raises:
        InvalidRequestError: there are too few ports or bytes, or the settings are those of one server.
    """
    check_announced(config)
    check_replication(config)
    return [_settings_of(config, machine, folder, index) for index in range(config.processes)]


def _settings_of(config: ServerConfig, machine: Machine, folder: pathlib.Path, index: int) -> ServerConfig:
    device, sharers = _device(config, machine, index)
    return msgspec.structs.replace(
        config,
        processes=1,
        bind=_bind(config, index),
        metrics=_counted(config, "metrics", index),
        status=_counted(config, "status", index),
        unix_socket=_socket(config, folder, index),
        handoff_socket=_handoff_socket(config, folder, index),
        device=device,
        threads=max((config.threads or machine.processors) // config.processes, 1),
        memory_budget=_budget(config, machine, device, sharers),
        memory_limit=(config.memory_limit or machine.memory_bytes) // config.processes,
        port_file="",
        data_dir=str(pathlib.Path(config.data_dir, str(index))) if config.data_dir else "",
        shard=f"{config.shard}-{index}" if config.shard else "",
        advertise=_counted(config, "advertise", index),
        checkpoint_store=f"{config.checkpoint_store.rstrip('/')}/{index}" if config.checkpoint_store else "",
    )


def _bind(config: ServerConfig, index: int) -> str:
    if unix_path(config.bind) is not None:
        return f"{config.bind}.{index}"
    return _counted(config, "bind", index)


def _counted(config: ServerConfig, field: str, index: int) -> str:
    """Return the address of a process: the port of the setting and those behind it, or free ones."""
    address: str = getattr(config, field)
    host_name, _, port = address.rpartition(":")
    if not port.isdigit() or not int(port):
        return address
    if int(port) + index > 65535:
        raise InvalidRequestError.of(
            field, f"{config.processes} processes need as many ports from {address!r} on; choose a lower port"
        )
    return f"{host_name}:{int(port) + index}"


def _socket(config: ServerConfig, folder: pathlib.Path, index: int) -> str:
    if config.socket_besides == "off" or unix_path(config.bind) is not None:
        return config.socket_besides
    if config.unix_socket != "auto":
        return f"{config.unix_socket}.{index}"
    return _own_path(folder / f"{index}.sock") or "auto"


def _handoff_socket(config: ServerConfig, folder: pathlib.Path, index: int) -> str:
    if config.handoff_socket:
        return f"{config.handoff_socket}.{index}"
    # Other users must reach the socket, and the folder is closed to them.
    return (
        ""
        if config.handoff_uids or not (config.shared_memory or config.packets)
        else _own_path(folder / f"{index}.handoff")
    )


def _own_path(path: pathlib.Path) -> str:
    return str(path) if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES else ""


def _device(config: ServerConfig, machine: Machine, index: int) -> tuple[str, int]:
    """Return the device of a process, and the number of processes on that device."""
    count = config.processes
    numbers = asked_gpus(config.device) or tuple(range(len(machine.gpu_memory_bytes)))
    if config.device == "cpu" or len(numbers) < 2:
        return config.device, count
    own = numbers[index::count] or (numbers[index % len(numbers)],)
    sharers = sum(other % len(numbers) == index % len(numbers) for other in range(count))
    return ",".join(f"cuda:{number}" for number in own), sharers


def _budget(config: ServerConfig, machine: Machine, device: str, sharers: int) -> int:
    """Return the budget of a process on each of its devices; 0, the default, if it shares them with no other."""
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
    if device == "auto" or not sizes:  # the choice may fall on the CPU
        sizes.append(machine.memory_bytes)
    return default_budget(DeviceInfo(device, "", min(sizes) // sharers))
