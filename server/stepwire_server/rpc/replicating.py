"""The role of a server among two: it serves alone, serves with a standby, or is a standby until it is promoted."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable
from typing import Final

import structlog

from stepwire.errors import FencedError, InvalidRequestError, Reason, StepwireError
from stepwire_server.config import ServerConfig
from stepwire_server.processes.standby_settings import FROM_DIRECTORY
from stepwire_server.records.session_reasons import OF_SESSIONS
from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.follower import Follower
from stepwire_server.replication.joining import leads_already, new_id, no_replication
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.replication.upkeep import Upkeep
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.rpc.follow_call import FollowCall
from stepwire_server.sessions.registry import Registry

__all__ = ["Replication"]

_log = structlog.get_logger()

_SERVICE: Final = "/stepwire.v1.OptimizerService/"
_OF_NO_SESSION: Final = frozenset({f"{_SERVICE}GetServerInfo", f"{_SERVICE}GetStatistics"})


class Replication:
    """The role of a server. Thread-safe.

    Attributes:
        server_id: the id of this process.
        epoch: the epoch of its sessions; 0 for a standby.
    """

    def __init__(self, config: ServerConfig, registry: Registry, clock: Callable[[], float]) -> None:
        """Have no role before `start`; the settings have passed `check_replication`."""
        self._config, self._registry, self._clock = config, registry, clock
        self.server_id, self.epoch = new_id(), 0
        self._codec = DurableCodec()
        shared = config.directory and (config.standby or config.standby_of)
        self._claims = Claims(pathlib.Path(config.directory), config.shard) if shared else None
        self._primary: Primary | None = None
        self._upkeep: Upkeep | None = None
        self._follower: Follower | None = None
        self._call: FollowCall | None = None
        self._endpoint, self._leads, self._hands_over = "", False, False
        self._promoting, self._telling = threading.Lock(), threading.Lock()
        self._changed: Callable[[str, bool], object] = lambda problem, lives: None
        self._announce: Callable[[int], object] = lambda epoch: None
        self._end: Callable[[], object] = lambda: None

    def start(
        self,
        endpoint: str,
        announce: Callable[[int], object],
        changed: Callable[[str, bool], object],
        end: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin in the role of the settings.

        Args:
            endpoint: the address of this server for clients.
            announce: tells clients that this server serves from an epoch on.
            changed: told with each change why this server serves no sessions, empty where it does, and whether it is
                well all the same.
            end: called once this process has no role any more, and a new one would follow its successor.

        Raises:
            InvalidRequestError: another server speaks for the sessions of this shard.
            OSError: the claims cannot be written.
        """
        self._endpoint, self._announce, self._changed, self._end = endpoint, announce, changed, end
        if (claim := self._first_claim()) is not None:
            self._lead(claim)
        elif self._config.standby_of:
            self._follower = Follower(self.server_id, self._codec, self._registry.remade, self._claims)
            self._call = FollowCall(
                self._config, self._follower, self._without_primary, self._clock, self._primary_endpoint
            )
            self._follower.start()
            self._call.start()
        self._tell()

    @property
    def problem(self) -> str:
        """The reason why this server serves no sessions; empty where it does."""
        if self._follower is not None and not self._leads:
            return "this server is a standby: use its primary, or promote it by `stepwire standby promote`"
        return "" if self._primary is None else self._primary.problem

    def admit(self, method: str) -> None:
        """Refuse a call about sessions while another server has them.

        Raises:
            FencedError: NOT_PRIMARY.
        """
        if method.startswith(_SERVICE) and method not in _OF_NO_SESSION and (problem := self.problem):
            raise FencedError(problem, reason=Reason.NOT_PRIMARY)

    def told(self, error: StepwireError) -> StepwireError:
        """Return the error that may be told in the place of another one: sessions may have gone on elsewhere."""
        return error if self._primary is None or error.reason not in OF_SESSIONS else self._primary.told(error)

    def hand_over(self, seconds: float) -> bool:
        """Have the standby promoted in the place of this server, which has drained; True if it was.

        Args:
            seconds: the longest wait for the standby.
        """
        self._hands_over = True
        return self._primary is not None and self._primary.hand_over(seconds)

    def close(self) -> None:
        """End. Closing twice is harmless."""
        if self._call is not None:
            self._call.close()
        if self._follower is not None:
            self._follower.close()
        if self._upkeep is not None:
            self._upkeep.close()
        if self._primary is not None:
            self._primary.release()

    # --- Standing ----------------------------------------------------------------------------------------

    def following(self, shard: str = "") -> tuple[Primary, Upkeep]:
        """See `Standing`."""
        if shard and self._config.shard and shard != self._config.shard:
            raise FencedError(
                f"the standby is of the shard {shard!r}, and this server of {self._config.shard!r}; look for its own",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch},
            )
        if self._follower is not None and not self._leads:
            raise FencedError(self.problem, reason=Reason.NOT_PRIMARY)
        if self._primary is None or self._upkeep is None:
            raise no_replication("accepts no standby")
        return self._primary, self._upkeep

    def promote(self, *, lossy: bool = False) -> tuple[int, int]:
        """See `Standing`."""
        follower = self._follower
        if follower is None:
            raise no_replication("is no standby") if self._primary is None else leads_already()
        with self._promoting:
            if follower.promoted:
                return self.epoch, len(follower.sessions())
            claim = follower.promote(self._endpoint, lossy=lossy)
            self._lead(claim)
            for each in follower.sessions():
                self._registry.publish(each.request_id, each.session)
                assert self._primary is not None
                self._primary.keep(each.session, each.request_id)
            assert self._call is not None
            self._call.promoted(claim.epoch)
            self._leads = True
            self._tell()
            self._announce(claim.epoch)
        _log.warning("promoted", epoch=claim.epoch, sessions=len(follower.sessions()))
        return claim.epoch, len(follower.sessions())

    def status(self) -> ReplicationStatus:
        """See `Standing`."""
        if self._follower is not None and not self._leads:
            return self._follower.status()
        if self._primary is None:
            return ReplicationStatus(server_id=self.server_id)
        return self._primary.status()._replace(promotions=int(self._leads))

    def _first_claim(self) -> Claim | None:
        """Return the claim of a server that has the shard's sessions from its start on; None for any other.

        Raises:
            InvalidRequestError: another server speaks for the sessions, and the settings make this one no standby.
        """
        config, claims = self._config, self._claims
        if not config.standby_of:
            first = Claim(1, self.server_id, "", self._endpoint) if config.standby else None
            return first if claims is None else claims.begin(self.server_id, self._endpoint)
        if config.standby_of != FROM_DIRECTORY or claims is None or claims.newest().server:
            return None
        try:
            return claims.begin(self.server_id, self._endpoint)
        except InvalidRequestError:  # another server began just now: this one follows it
            return None

    def _primary_endpoint(self) -> str:
        """Return the address of the primary as of now; where nobody is, this server's own, which refuses."""
        if self._config.standby_of != FROM_DIRECTORY or self._claims is None:
            return self._config.standby_of
        return self._claims.newest().endpoint or self._endpoint

    def _lead(self, claim: Claim) -> None:
        """Speak for sessions from a claim on."""
        alone = self._config.standby != "required"
        self._primary = Primary(self.server_id, claim, self._claims, self._clock, alone=alone, returns_alone=alone)
        self.epoch = self._registry.epoch = claim.epoch
        self._upkeep = Upkeep(self._primary, self._codec, self._clock, self._config.digest_seconds)
        self._registry.replicas = self._upkeep
        self._primary.on_wake(self._look_at_role)
        self._upkeep.start()

    def _look_at_role(self) -> None:
        """Tell of the present role; a server that was overtaken comes back as a standby, in another process."""
        self._tell()
        if self.problem and self._config.standby_of == FROM_DIRECTORY and not self._hands_over:
            self._end()

    def _tell(self) -> None:
        """Tell whether this server serves. Of several threads the last one tells of the newest moment."""
        with self._telling:
            self._changed(self.problem, self._follower is not None and not self._leads)

    def _without_primary(self, seconds: float) -> None:
        """Promote this standby where its primary has ended, or is away for too long."""
        follower, claims, most = self._follower, self._claims, self._config.promote_after_seconds
        assert follower is not None
        if self._config.standby_of == FROM_DIRECTORY and claims is not None and not claims.newest().server:
            follower.begin("", 0, whole=True)  # nobody speaks for the shard: its sessions have ended, or were given up
            self.promote(lossy=True)
        elif follower.handed_over or (most and follower.is_member and seconds >= most):
            self.promote()
