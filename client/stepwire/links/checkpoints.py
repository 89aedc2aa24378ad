"""The checkpoints of a session over its link, those of shards as one."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.connection.retry import Deadline
from stepwire.errors import InvalidRequestError, StepMismatchError
from stepwire.links.link import SessionLink, StateOrigin
from stepwire.results import CheckpointInfo
from stepwire.v1 import checkpoint_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["check_everywhere", "check_reachable", "delete", "list_all", "save", "verify"]


def save(link: SessionLink, name: str, deadline: Deadline) -> CheckpointInfo:
    """Save a checkpoint of all shards. The caller holds the link's lock, so that no step of its own comes between.

    Raises:
        StepMismatchError: the shards were at different steps.
        StateLossError: as `SessionLink.make_sure`.
        StepwireError: as `SessionLink.ask`.
    """
    link.make_sure(deadline)
    responses = link.ask("SaveCheckpoint", pb.SaveCheckpointRequest(name=name), pb.SaveCheckpointResponse, deadline)
    info = _combined(name, [response.checkpoint for response in responses])
    if info.damage:
        raise StepMismatchError(
            f"checkpoint {name!r}: {info.damage}; delete it, and save again", metadata={"name": name}
        )
    return info


def list_all(link: SessionLink, deadline: Deadline) -> tuple[CheckpointInfo, ...]:
    """Return the checkpoints, ordered by name. One that some shards have not, or have of another step, is damaged.

    Raises:
        StepwireError: as `SessionLink.ask`.
    """
    responses = link.ask("ListCheckpoints", pb.ListCheckpointsRequest(), pb.ListCheckpointsResponse, deadline)
    shards = [{each.name: each for each in response.checkpoints} for response in responses]
    names = sorted({name for shard in shards for name in shard})
    return tuple(_combined(name, [shard.get(name) for shard in shards]) for name in names)


def verify(link: SessionLink, name: str, deadline: Deadline) -> CheckpointInfo:
    """Have all of a checkpoint read.

    Raises:
        StepwireError: as `SessionLink.ask`.
    """
    request = pb.VerifyCheckpointRequest(name=name)
    responses = link.ask("VerifyCheckpoint", request, pb.VerifyCheckpointResponse, deadline)
    return _combined(name, [response.checkpoint for response in responses])


def delete(link: SessionLink, name: str, deadline: Deadline) -> None:
    """Delete a checkpoint of all shards.

    Raises:
        StepwireError: as `SessionLink.ask`.
    """
    link.ask("DeleteCheckpoint", pb.DeleteCheckpointRequest(name=name), pb.DeleteCheckpointResponse, deadline)


def check_everywhere(link: SessionLink, origin: StateOrigin, deadline: Deadline) -> None:
    """Refuse a checkpoint that not all shards have of one step, before a shard goes back to it.

    Raises:
        InvalidRequestError: it is so.
        StepwireError: as `SessionLink.ask`.
    """
    if len(link.shards) == 1 or origin.checkpoint is None:
        return
    found = {info.name: info for info in list_all(link, deadline)}
    if (info := found.get(origin.checkpoint)) is None or info.damage:
        problem = f"there are {', '.join(list(found)[:20]) or 'none'}" if info is None else info.damage
        raise InvalidRequestError.of("checkpoint", f"{origin.checkpoint!r} cannot be used: {problem}")


def check_reachable(link: SessionLink, origin: StateOrigin, deadline: Deadline) -> None:
    """Refuse a state that some shards may be unable to go back to, before a shard goes back to it.

    No call tells which steps the log of a server reaches. So shards go back to checkpoints alone: a shard that cannot
    follow the others would leave the session with half a rollback.

    Raises:
        InvalidRequestError: it is so.
        StepwireError: as `SessionLink.ask`.
    """
    if len(link.shards) > 1 and origin.step is not None:
        raise InvalidRequestError.of(
            "step",
            f"the logs of {len(link.shards)} servers may reach back differently, and a rollback of some shards alone "
            "would be half done; use rollback(checkpoint=...) with one of `checkpoints`",
        )
    check_everywhere(link, origin, deadline)


def _combined(name: str, messages: Sequence[checkpoint_pb2.Checkpoint | None]) -> CheckpointInfo:
    """Return one line for a checkpoint of all shards; None stands for a shard that has none of this name."""
    infos = [CheckpointInfo.from_wire(message) for message in messages if message is not None]
    if len(messages) == 1:
        return infos[0]
    problems = [
        f"shard {rank} has none of this name" if message is None else f"shard {rank}: {message.damage}"
        for rank, message in enumerate(messages)
        if message is None or message.damage
    ]
    if not problems and len(steps := {(info.step, info.load) for info in infos}) > 1:
        problems = [f"the shards have it of different steps and loads, {sorted(steps)}"]
    return CheckpointInfo(
        name=name,
        step=0 if problems else infos[0].step,
        load=0 if problems else infos[0].load,
        create_time=max((info.create_time for info in infos if info.create_time is not None), default=None),
        nbytes=sum(info.nbytes for info in infos),
        damage="; ".join(problems),
        stored=len(infos) == len(messages) and all(info.stored for info in infos),
        store_problem=next((info.store_problem for info in infos if info.store_problem), ""),
    )
