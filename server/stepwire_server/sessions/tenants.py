"""The sessions that one tenant sees. Another tenant's are not there: nothing tells them from ids that never were."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stepwire_server.devices.pool import Device
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.session_statistics import RegistryStatistics
from stepwire_server.sessions.beginning import Beginning, Created
from stepwire_server.sessions.disk_use import bytes_on_disk
from stepwire_server.sessions.ledger import session_not_found
from stepwire_server.sessions.parked import ParkedSession
from stepwire_server.sessions.session import Session

if TYPE_CHECKING:
    from stepwire_server.sessions.registry import Registry

__all__ = ["TenantSessions", "own_request_id", "qualified", "tenant_of"]

_SEPARATOR = "/"
"""Between a tenant and the id of a request; neither may have it."""


def qualified(tenant: str, request_id: str) -> str:
    """Return the name of a tenant's request among those of all tenants."""
    return f"{tenant}{_SEPARATOR}{request_id}" if tenant else request_id


def tenant_of(name: str) -> str:
    """Return the tenant of a request, by its qualified name."""
    return name.rpartition(_SEPARATOR)[0]


def own_request_id(name: str) -> str:
    """Return the id of a request, as its tenant gave it."""
    return name.rpartition(_SEPARATOR)[2]


class TenantSessions:
    """The registry as one tenant sees it; `Registry` documents the calls. Thread-safe."""

    def __init__(self, registry: Registry, tenant: str | None) -> None:
        """See the sessions of a tenant; None sees those of all, and creates those of the empty one."""
        self._registry = registry
        self._tenant = tenant

    def statistics(self) -> RegistryStatistics:
        """See `Registry.statistics`; of the bytes reserved, those of sessions alone."""
        registry, tenant = self._registry, self._tenant
        if tenant is None:
            return registry.statistics()
        present = registry.of(tenant)
        return RegistryStatistics(
            len(present),
            sum(stream.tenant == tenant for stream in registry.streams),
            sum(session.memory_bytes for session in present),
            registry.pool.limit_bytes,
            len(set(registry.ids_of(tenant)).difference(session.session_id for session in present)),
        )

    def reserved_bytes(self, device: Device) -> int:
        """Count the bytes reserved on a device; for one tenant those of its sessions."""
        if self._tenant is None:
            return device.budget.reserved_bytes
        own = self._registry.of(self._tenant)
        return sum(session.memory_bytes for session in own if session.device == device.name)

    def check(self, session_id: str) -> str:
        """Return the id of a session that this tenant may name.

        Raises:
            SessionNotFoundError: it is another tenant's.
        """
        if self._tenant is not None and self._registry.tenant_of(session_id) not in (None, self._tenant):
            raise session_not_found(session_id)
        return session_id

    def get(self, session_id: str) -> Session:
        """See `Registry.get`."""
        return self._registry.get(self.check(session_id))

    def create(self, request_id: str, config: SessionConfig, beginning: Beginning | None = None) -> Created:
        """See `Registry.create`; a durable session needs room on the disk."""
        if config.durability.on_disk:
            self.check_disk(lambda: self.created(request_id) is not None)
        return self._registry.create(self.named(request_id), config, beginning)

    def created(self, request_id: str) -> Created | None:
        """See `Registry.created`."""
        return self._registry.created(self.named(request_id))

    def check_disk(self, is_there: Callable[[], bool]) -> None:
        """Refuse more on the disk beyond the tenant's limit, unless it is there: then this is a repeated request.

        Raises:
            ResourceExhaustedError: the tenant has all the bytes that it may have.
        """
        limits, directory, tenant = self._registry.limits.tenant, self._registry.directory, self._tenant or ""
        if not limits.disk_bytes or directory is None:
            return
        held = bytes_on_disk(directory.checkpoints(each).folder for each in self._registry.ids_of(tenant))
        if held >= limits.disk_bytes and not is_there():
            limits.check_disk(held)

    def named(self, request_id: str) -> str:
        """Return the qualified name of a request of this tenant."""
        return qualified(self._tenant or "", request_id)

    def page(self, after: str, size: int) -> tuple[list[Session | ParkedSession], str]:
        """See `Registry.page`."""
        return self._registry.page(after, size, self._tenant)

    def delete(self, session_id: str, token: int = 0) -> int:
        """See `Registry.delete`."""
        return self._registry.delete(self.check(session_id), token)
