"""The move of a model from the servers that it has to others, in any numbers, at the end of a step.

1. Sessions for the new ranges are created. Nobody else knows their ids.
2. The sessions of all shards are frozen, and come to rest at one step. Clients repeat their next one meanwhile.
3. Their state is copied, in bounded memory, while the freeze is renewed.
4. The first former shard keeps the record of the successor. That is the decision.
5. The other former shards keep it too, and all of them have ended.

Whatever ends in between: before the decision the former shards go on, by themselves once the freeze is over, and the
new sessions are in vain. Behind it the new ones count. A former shard that has no record yet makes no step of the whole
any more, since none is made without the first one.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Sequence
from typing import Any, Final

from stepwire.connection.retry import Deadline
from stepwire.errors import (
    DataLossError,
    SessionMovedError,
    SessionNotFoundError,
    StateChangedError,
    StepMismatchError,
    StepwireError,
)
from stepwire.links.server import LinkOptions, RemoteServer
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.partition import Partition
from stepwire.sharding.rest import Rest
from stepwire.sharding.server import ShardedServer
from stepwire.sharding.shard_configs import configs_of, partition_of
from stepwire.sharding.successors import FoundShard, ShardPlace
from stepwire.sharding.transfer import Transfer
from stepwire.sharding.whole import check_alike, whole_session
from stepwire.v1 import move_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.messages import duration_to_wire

__all__ = ["Move"]

_FREEZE_SECONDS: Final = 15.0
_REST_SECONDS: Final = 30.0
"""The time that shards may need to come to one step: that of a client to repeat a step that one of them has."""
_DISK_SECONDS: Final = 0.1
"""The pause before a record that a disk has refused is sent again."""
_END_SECONDS: Final = 5.0


class Move:
    """One move."""

    def __init__(self, here: ShardedServer, there: Sequence[RemoteServer]) -> None:
        """Move sessions from some servers to others; a server may be among both."""
        self._here, self._there = here, tuple(there)
        self._move_id = secrets.token_hex(16)
        self._former: list[FoundShard] = []
        self._new: list[FoundShard] = []
        self._rest = Rest()
        self._keys: Sequence[bytes] = ()

    def make(self, session_id: str, deadline: Deadline) -> str:
        """Move a session, and return the id that it has from now on.

        What a broken move left open is completed first. A session that an earlier move has brought to these servers
        stays there; one that is at others moves from those.

        Raises:
            UnsupportedFeatureError: the session has what cannot be moved; the message names it.
            StepMismatchError: the shards are not at one step, and their client does not bring them there.
            StepwireError: the failure of a server. Before the decision the session stays where it was; if that is not
                known, the message says so.
        """
        places = self._here.successors.places(session_id.split(","))
        moved = False
        while not self._found(places, deadline):
            places, moved = self._completed(places, deadline), True
        config, former = self._whole()
        new = partition_of(config, len(self._there))
        if moved and self._is_there(len(new.shards)):
            return ",".join(link.description.session_id for _, link in self._former)
        try:
            self._copy(config, former, new, deadline)
        except SessionMovedError:  # by another move, or by one whose record was refused before and is kept now
            self._undo()
            return Move(self._here, self._there).make(session_id, deadline)
        except BaseException:
            self._undo()
            raise
        return self._hand_over(deadline)

    # --- before the decision -----------------------------------------------------------------------------

    def _found(self, places: Sequence[ShardPlace], deadline: Deadline) -> bool:
        """Find the shards at these places; false if they have moved from there."""
        try:
            self._former = fan_out([functools.partial(self._find, place, deadline) for place in places])
        except SessionMovedError:
            return False
        return True

    def _find(self, place: ShardPlace, deadline: Deadline) -> FoundShard:
        return FoundShard(
            *self._here.successors.at_holder(
                place, lambda server: server.find(place.session_id, deadline.remaining() or None, LinkOptions())
            )
        )

    def _whole(self) -> tuple[session_pb2.SessionConfig, Partition]:
        """Return the config of the model, and the partition that it has.

        Raises:
            InvalidRequestError: these are not the shards of one model.
        """
        messages = [link.description.message for _, link in self._former]
        check_alike(messages)
        former = Partition.read([link.description.packer.layout for _, link in self._former])
        return whole_session(messages, former.layout).config, former

    def _is_there(self, count: int) -> bool:
        """Tell whether the shards are on those of the new servers that a model of so many shards needs, in order."""
        pairs = zip(self._former, self._there, strict=False)
        return len(self._former) == count and all(found.server.calls.target in new.targets for found, new in pairs)

    def _copy(self, config: session_pb2.SessionConfig, former: Partition, new: Partition, deadline: Deadline) -> None:
        """Create the new sessions, freeze the former ones, and copy their state."""
        configs = configs_of(config, new)

        def create(rank: int) -> None:
            server, name = self._there[rank], f"{self._move_id}.{rank}"
            link = server.create(configs[rank], name, deadline.remaining() or None, LinkOptions())
            created[rank] = FoundShard(server, link)

        created: dict[int, FoundShard] = {}
        try:
            fan_out([functools.partial(create, rank) for rank in range(len(configs))])
        finally:
            self._new = [created[rank] for rank in sorted(created)]
        self._come_to_rest(deadline)
        transfer = Transfer(former, self._former, new, self._new)
        self._keys = transfer.make(self._move_id, self._renew, deadline)

    def _come_to_rest(self, deadline: Deadline) -> None:
        """Freeze all shards at one moment: the last that any of them has.

        Raises:
            StepMismatchError: a shard does not come there.
        """
        frozen: list[pb.FreezeSessionResponse] = []

        def attempt(_: Deadline) -> None:
            frozen[:] = self._freeze(deadline)  # a slow answer is an answer: attempts are over in time, not calls
            self._rest = Rest.of(frozen)
            self._rest.check_reached(frozen)

        retry = self._former[0].server.calls.retry
        try:
            retry.call(attempt, retry.deadline(min(_REST_SECONDS, deadline.remaining())))
        except StateChangedError:
            steps = [each.applied_step for each in frozen]
            raise StepMismatchError(
                f"the shards are at the steps {steps}, and their clients do not finish step {self._rest.step}; have "
                "them repeat that step with the same gradients, or load one state into all, and move the session then",
                metadata={"steps": ",".join(map(str, steps))},
            ) from None

    def _freeze(self, deadline: Deadline) -> list[pb.FreezeSessionResponse]:
        """Freeze all former shards, at the bound or where they are beyond it."""

        def freeze(shard: FoundShard) -> pb.FreezeSessionResponse:
            request = pb.FreezeSessionRequest(
                session_id=shard.link.description.session_id,
                move_id=self._move_id,
                last_step=self._rest.step,
                last_contributions=self._rest.wire_contributions,
                lease=duration_to_wire(_FREEZE_SECONDS),
            )
            response: pb.FreezeSessionResponse = self._ask(
                shard, "FreezeSession", request, pb.FreezeSessionResponse, deadline
            )
            return response

        return fan_out([functools.partial(freeze, shard) for shard in self._former])

    def _renew(self, over: threading.Event) -> None:
        """Keep the former shards frozen until the copy is over."""
        while not over.wait(_FREEZE_SECONDS / 3):
            self._freeze(self._former[0].server.calls.deadline(_FREEZE_SECONDS / 3))

    def _undo(self) -> None:
        """Let the former shards go on, and end the new ones; what cannot be reached now has its time."""
        with contextlib.suppress(StepwireError):
            fan_out([functools.partial(self._thaw, shard) for shard in self._former])
        with contextlib.suppress(StepwireError):
            fan_out([shard.link.close for shard in self._new])

    def _thaw(self, shard: FoundShard) -> None:
        request = pb.ThawSessionRequest(session_id=shard.link.description.session_id, move_id=self._move_id)
        shard.server.calls.unary("ThawSession", request, pb.ThawSessionResponse, _END_SECONDS)

    # --- the decision, and behind it ---------------------------------------------------------------------

    def _hand_over(self, deadline: Deadline) -> str:
        """Have all former shards keep the record, the first one first, and return the new id.

        Raises:
            StepwireError: as `_decide`; or the session has moved, and its new id is in the metadata.
        """
        successor = move_pb2.Successor()
        for (server, link), key in zip(self._new, self._keys, strict=True):
            successor.shards.add(session_id=link.description.session_id, target=server.calls.target, attach_key=key)
        moved = ",".join(each.session_id for each in successor.shards)
        first, *others = self._former
        self._decide(first, successor, deadline)
        try:
            fan_out([functools.partial(self._keep, each, successor, deadline, decided=True) for each in others])
        except StepwireError as error:
            problem = "the session has moved, and a former shard has no record of it: move it again"
            raise _retold(error, problem, moved) from None
        return moved

    def _decide(self, first: FoundShard, successor: move_pb2.Successor, deadline: Deadline) -> None:
        """Have the first shard keep the record.

        Raises:
            StateChangedError: it does not rest any more; the session stays where it was.
            SessionMovedError: another move was faster.
            StepwireError: nobody can tell whether it has the record.
        """
        try:
            self._keep(first, successor, deadline, decided=False)
        except (SessionMovedError, SessionNotFoundError, StateChangedError):
            self._undo()
            raise
        except DataLossError as error:  # the server waits for this very record, which the next move has it keep
            problem = "nobody can tell whether the session has moved: mend the disk or the store, and move it again"
            raise _retold(error, problem) from None
        except StepwireError as error:
            raise _retold(error, "nobody can tell whether the session has moved: move it again") from None

    def _keep(self, shard: FoundShard, successor: move_pb2.Successor, deadline: Deadline, *, decided: bool) -> None:
        request = pb.HandOverSessionRequest(
            session_id=shard.link.description.session_id,
            move_id=self._move_id,
            successor=successor,
            decided=decided,
            step=self._rest.step,
            load=self._rest.load,
            epoch=self._rest.epoch,
            contributions=self._rest.wire_contributions,
        )
        refused: list[StateChangedError] = []

        def attempt(left: Deadline) -> None:
            try:
                shard.server.calls.once("HandOverSession", request, pb.HandOverSessionResponse, left.remaining())
            except StateChangedError as error:  # it does not rest any more, so asking again is in vain
                refused.append(error)
            except DataLossError as error:  # the same record may be kept yet, and no other one is
                error.retry_after_seconds = _DISK_SECONDS
                raise
            except StepwireError as error:
                raise shard.server.calls.followed(error, left) from None

        shard.server.calls.retry.call(attempt, deadline)
        if refused:
            raise refused[0]

    def _completed(self, places: Sequence[ShardPlace], deadline: Deadline) -> list[ShardPlace]:
        """Complete an earlier move, whose first shard has the record and others perhaps not; return where it led.

        Raises:
            StepwireError: the failure of a server.
        """
        successor, followed = move_pb2.Successor(), self._here.successors.followed(places, deadline)
        for place in followed:
            successor.shards.add(session_id=place.session_id, target=place.servers[0].calls.target)

        def complete(place: ShardPlace) -> None:
            try:
                self._keep(self._find(place, deadline), successor, deadline, decided=True)
            except (SessionMovedError, SessionNotFoundError):
                return

        fan_out([functools.partial(complete, place) for place in places])
        return followed

    @staticmethod
    def _ask(shard: FoundShard, method: str, request: Any, response: Any, deadline: Deadline) -> Any:
        """Make a unary call, again until the deadline.

        Raises:
            StepwireError: the server's refusal, or no connection.
        """
        return shard.server.calls.unary(method, request, response, deadline)


def _retold(error: StepwireError, problem: str, session_id: str = "") -> StepwireError:
    """Return an error with the state of the move, and the session's new id if it has one."""
    metadata = {**error.metadata, **({"session_id": session_id} if session_id else {})}
    return type(error)(f"{problem}; {error}", reason=error.reason, metadata=metadata)
