"""The identity behind a call, and the roles with the methods that each may call."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["EVERYBODY", "METHODS", "METRICS_PATH", "OF_ALL_TENANTS", "STATUS_PATH", "Identity", "Role"]


class Role(enum.StrEnum):
    """The rights of a token; each has those of the roles before it, but for `METRICS` and `STANDBY`."""

    METRICS = "metrics"
    STANDBY = "standby"
    READER = "reader"
    TRAINER = "trainer"
    ADMIN = "admin"


class Identity(NamedTuple):
    """The identity behind a call.

    Attributes:
        name: the name of the token.
        tenant: the tenant whose sessions it sees; empty for the only one. An administrator of the empty one sees all.
        role: its role.
        expires: the time of its end, in seconds since 1970; infinity for none.
        digest: the SHA-256 of its token, in hexadecimal digits; empty without a line in the file of tokens.
        key: the digest of the key that has signed its token; empty where none has.
    """

    name: str
    tenant: str
    role: Role
    expires: float = math.inf
    digest: str = ""
    key: str = ""

    @property
    def sees(self) -> str | None:
        """The tenant whose sessions it sees; None for those of all. The role `METRICS` sees their numbers alone."""
        return None if self.role in (Role.ADMIN, Role.METRICS) and not self.tenant else self.tenant


EVERYBODY: Final = Identity("", "", Role.ADMIN)
"""The identity of all calls to a server without tokens."""

_SERVICE: Final = "/stepwire.v1.OptimizerService/"
_REPLICATION: Final = "/stepwire.v1.ReplicationService/"
_HEALTH: Final = "/grpc.health.v1.Health/"
_READERS: Final = frozenset({Role.READER, Role.TRAINER, Role.ADMIN})
_TRAINERS: Final = frozenset({Role.TRAINER, Role.ADMIN})
_ALL: Final = frozenset(Role)

METRICS_PATH: Final = "/metrics"
"""The path of the metrics, over HTTP: a row of the table of methods like any other."""

STATUS_PATH: Final = "/status"
"""The name of the status page in the table, whatever file of it is asked for."""

METHODS: Final[Mapping[str, frozenset[Role]]] = {
    METRICS_PATH: frozenset({Role.METRICS, Role.ADMIN}),
    STATUS_PATH: _READERS,
    f"{_HEALTH}Check": _ALL,
    f"{_HEALTH}List": _ALL,
    f"{_HEALTH}Watch": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READERS,
    f"{_SERVICE}GetServerInfo": _ALL,
    f"{_SERVICE}GetSession": _READERS,
    f"{_SERVICE}ListSessions": _READERS,
    f"{_SERVICE}GetStatistics": _READERS,
    f"{_SERVICE}ListCheckpoints": _READERS,
    f"{_SERVICE}VerifyCheckpoint": _READERS,
    f"{_SERVICE}Pull": _READERS,
    f"{_SERVICE}CreateSession": _TRAINERS,
    f"{_SERVICE}DeleteSession": _TRAINERS,
    f"{_SERVICE}Attach": _TRAINERS,
    f"{_SERVICE}Step": _TRAINERS,
    f"{_SERVICE}Load": _TRAINERS,
    f"{_SERVICE}SaveCheckpoint": _TRAINERS,
    f"{_SERVICE}DeleteCheckpoint": _TRAINERS,
    f"{_SERVICE}Rollback": _TRAINERS,
    f"{_SERVICE}ForkSession": _TRAINERS,
    f"{_SERVICE}FreezeSession": _TRAINERS,
    f"{_SERVICE}ThawSession": _TRAINERS,
    f"{_SERVICE}ExportSession": _TRAINERS,
    f"{_SERVICE}ImportSession": _TRAINERS,
    f"{_SERVICE}HandOverSession": _TRAINERS,
    f"{_SERVICE}GetSuccessor": _READERS,
    f"{_REPLICATION}Follow": frozenset({Role.STANDBY, Role.ADMIN}),
    f"{_REPLICATION}Promote": frozenset({Role.ADMIN}),
    f"{_REPLICATION}ForgetStandby": frozenset({Role.ADMIN}),
    f"{_REPLICATION}GetReplication": _READERS | {Role.STANDBY},
}
"""The roles that may call each method. A method that is not here is nobody's."""

OF_ALL_TENANTS: Final = frozenset(
    {METRICS_PATH, *(f"{_REPLICATION}{name}" for name in ("Follow", "Promote", "ForgetStandby", "GetReplication"))}
)
"""The methods that tell of the sessions of all tenants, or move them: a token of one tenant may not call them."""
