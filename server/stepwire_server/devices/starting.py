"""The devices of a server, started as its settings name them."""

from __future__ import annotations

import structlog

from stepwire_server.config import ServerConfig
from stepwire_server.devices.fair_share import parse_weights
from stepwire_server.devices.kernels import KernelLimits
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines import CudaOptions, choose_engines

__all__ = ["start_devices"]

_log = structlog.get_logger()


def start_devices(config: ServerConfig) -> DevicePool:
    """Start the devices that the settings name, and log the choice with its reason."""
    weights = parse_weights(config.tenant_weights)
    options = CudaOptions(config.gpu_bus_buffers, config.gpu_bus_buffer_bytes, config.gpu_gradient_cache_bytes)
    choice = choose_engines(
        config.device,
        config.threads or None,
        options=options,
        lane_spin_microseconds=config.lane_spin_microseconds,
    )
    pool = DevicePool.of(
        choice.engines, config.memory_budget, weights, KernelLimits(config.max_kernels, config.tenant_max_kernels)
    )
    log = _log.warning if choice.remarkable else _log.info
    log("devices chosen", devices=", ".join(device.name for device in pool), why=choice.why)
    for device in pool:
        info = device.engine.device
        _log.info(
            "device",
            name=info.name,
            description=info.description,
            memory_bytes=info.memory_bytes,
            budget_bytes=device.budget.limit_bytes,
        )
    return pool
