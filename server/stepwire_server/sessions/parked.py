"""A parked session, as a list has it: read from its folder, and not brought back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stepwire.errors import StepwireError
from stepwire_server.devices.pool import DevicePool
from stepwire_server.observability.digests import digest_in_logs
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.session_kernels import compile_kernels

__all__ = ["ParkedSession", "compile_ahead", "durable_steps", "parked_session", "with_parked"]


class ParkedSession(NamedTuple):
    """One session that is on disk alone.

    Attributes:
        session_id: its id.
        epoch: the epoch of the server that owns it.
        config: its config.
        step: the last step of its newest checkpoint.
        durable_step: the last step that survives a loss of the server.
        load: the last load of it.
        ready: it has parameters.
        create_time: the time of its creation, in seconds since 1970.
    """

    session_id: str
    epoch: int
    config: SessionConfig
    step: int
    durable_step: int
    load: int
    ready: bool
    create_time: float


def parked_session(directory: DataDirectory, session_id: str) -> ParkedSession:
    """Describe a session by its folder.

    Raises:
        SessionNotFoundError: there is none of this id.
        DataLossError: its folder is damaged.
    """
    archived = directory.archived(session_id)
    config = directory.codec.decode_config(archived.config)
    checkpoint = directory.checkpoints(session_id).newest().checkpoint
    if checkpoint is None:
        return ParkedSession(session_id, directory.epoch, config, 0, 0, 0, config.start_at_zero, archived.create_time)
    with checkpoint:
        manifest = checkpoint.manifest
        return ParkedSession(
            session_id,
            directory.epoch,
            config,
            manifest.step,
            directory.durable_step(session_id, config, manifest.step),
            manifest.load,
            manifest.ready,
            archived.create_time,
        )


def compile_ahead(directory: DataDirectory, session_id: str, pool: DevicePool, tenant: str) -> None:
    """Compile the kernels of a parked session before it comes back; of a problem its return tells."""
    with contextlib.suppress(StepwireError, OSError):
        config = directory.codec.decode_config(directory.archived(session_id).config)
        device, numbers = pool.choose_like(config.device), (config.groups, config.gradient_dtype, config.reply_dtype)
        with device.kernels.asked_by(tenant):
            compile_kernels(device.engine, config, *numbers, rows=bool(config.tables))


def with_parked(
    directory: DataDirectory | None, ids: Iterable[str], present: Mapping[str, Session]
) -> list[Session | ParkedSession]:
    """Return the sessions of some ids, from memory or as their folders describe them."""
    found = list[Session | ParkedSession]()
    for session_id in ids:
        if session_id in present:
            found.append(present[session_id])
        elif directory is not None:
            with contextlib.suppress(StepwireError):  # ended just now, or to be repaired
                found.append(parked_session(directory, session_id))
    return found


def durable_steps(sessions: Iterable[Session | ParkedSession]) -> dict[str, int]:
    """Return the last step of each durable session that came from an earlier server, by the digest of its id."""
    return {
        digest_in_logs(each.session_id): max(each.ledger.durable_step, each.ledger.kept_step)
        if isinstance(each, Session)
        else each.durable_step
        for each in sessions
        if each.config.durability.level != "memory"
    }
