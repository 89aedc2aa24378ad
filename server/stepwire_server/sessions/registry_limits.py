"""The limits of a server, and those of one tenant below them: no tenant takes all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.config import ServerConfig
from stepwire_server.sessions.idle import with_idle_sessions

if TYPE_CHECKING:
    from stepwire_server.sessions.session import Session

__all__ = ["RegistryLimits", "TenantLimits", "limits_of"]


class TenantLimits(NamedTuple):
    """The most of each kind for each tenant; 0 for no limit but the server's.

    Attributes:
        sessions: the sessions in memory.
        streams: the attached streams.
        state_bytes: the bytes of the sessions in memory, on all devices.
        steps_per_second: the steps of all its sessions in a second.
        disk_bytes: the bytes of the checkpoints of its sessions, parked ones too.
    """

    sessions: int = 0
    streams: int = 0
    state_bytes: int = 0
    steps_per_second: int = 0
    disk_bytes: int = 0

    def check_session(self, session: Session, others: Sequence[Session], now: float) -> None:
        """Refuse a session that is one too many for its tenant, or too large.

        Args:
            session: the session, which nobody sees yet.
            others: the sessions of its tenant.
            now: the clock reading.

        Raises:
            ResourceExhaustedError: it is.
        """
        if self.sessions and len(others) >= self.sessions:
            error = ResourceExhaustedError(
                f"this tenant has {len(others)} sessions, its most; close some, or have the server started with a "
                "larger --tenant-max-sessions",
                reason=Reason.TOO_MANY_SESSIONS,
                metadata={"limit": "tenant_max_sessions", "most": self.sessions},
            )
            raise with_idle_sessions(error, others, now)
        held = sum(each.memory_bytes for each in others)
        if self.state_bytes and held + session.memory_bytes > self.state_bytes:
            error = ResourceExhaustedError(
                f"the session needs {session.memory_bytes} bytes and {self.state_bytes - held} of this tenant's "
                f"{self.state_bytes} are free; close sessions, or have the server started with a larger "
                "--tenant-memory",
                reason=Reason.MEMORY_EXHAUSTED,
                metadata={"limit": "tenant_memory", "most": self.state_bytes, "requested_bytes": session.memory_bytes},
            )
            raise with_idle_sessions(error, others, now)

    def check_disk(self, held: int) -> None:
        """Refuse more on the disk where a tenant has so many bytes there.

        Raises:
            ResourceExhaustedError: they are its most, or more.
        """
        if held >= self.disk_bytes:
            raise ResourceExhaustedError(
                f"this tenant's sessions hold {held} bytes on the disk, parked ones too, and {self.disk_bytes} are its "
                "most; delete checkpoints or sessions, or have the server started with a larger --tenant-disk",
                reason=Reason.MEMORY_EXHAUSTED,
                metadata={"limit": "tenant_disk", "most": self.disk_bytes},
            )

    def check_stream(self, attached: int) -> None:
        """Refuse a stream beside as many attached ones of its tenant.

        Raises:
            ResourceExhaustedError: they are its most.
        """
        if self.streams and attached >= self.streams:
            raise ResourceExhaustedError(
                f"this tenant has {attached} attached streams, its most; detach some, or have the server started with "
                "a larger --tenant-max-streams",
                reason=Reason.TOO_MANY_STREAMS,
                metadata={"limit": "tenant_max_streams", "most": self.streams},
                retry_after_seconds=1.0,
            )


class RegistryLimits(NamedTuple):
    """The limits of a server, and of each of its tenants.

    Attributes:
        sessions: the most sessions in memory.
        streams: the most attached streams.
        idle_seconds: the longest silence of a stream where it must not be silent.
        tenant: the limits of each tenant.
    """

    sessions: int
    streams: int
    idle_seconds: float
    tenant: TenantLimits = TenantLimits()


def limits_of(config: ServerConfig) -> RegistryLimits:
    """Return the limits in some settings."""
    tenant = TenantLimits(
        config.tenant_max_sessions,
        config.tenant_max_streams,
        config.tenant_memory,
        config.tenant_steps_per_second,
        config.tenant_disk,
    )
    return RegistryLimits(config.max_sessions, config.max_streams, config.step_idle_seconds, tenant)
