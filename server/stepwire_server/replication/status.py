"""How replication stands on a server."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["ReplicationStatus"]


class ReplicationStatus(NamedTuple):
    """How replication stands; `GetReplicationResponse` of the contract documents the fields."""

    role: Literal["none", "primary", "standby", "deposed"] = "none"
    epoch: int = 0
    server_id: str = ""
    peer_id: str = ""
    connected: bool = False
    in_sync: bool = False
    position: int = 0
    acknowledged: int = 0
    sessions: int = 0
    incomplete: int = 0
    divergences: int = 0
    problem: str = ""
    pending_steps: int = 0
    pending_bytes: int = 0
    acknowledged_steps: int = 0
    promotions: int = 0
