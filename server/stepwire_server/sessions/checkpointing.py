"""Checkpoints of a session: taken while it steps, and read back into a new one."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import msgspec
import structlog

from stepwire.errors import DataLossError, Reason, ResourceExhaustedError
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.manifest import Manifest, Shadow
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.exchange import Captured
from stepwire_server.sessions.row_numbers import row_slots
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.shadow import differs, read_probe
from stepwire_server.sessions.workers import Holder

__all__ = ["Saved", "check_as_saved", "numbers_of", "restore", "save"]

_log = structlog.get_logger()


class Saved(NamedTuple):
    """A checkpoint that was saved.

    Attributes:
        step: the last step in it.
        load: the last load in it.
        position: the number of the log's last record that it makes superfluous.
    """

    step: int
    load: int
    position: int


def save(session: Session, store: CheckpointStore, name: str, config: dict[str, Any]) -> Saved:
    """Take a checkpoint of the present moment, while steps go on.

    Args:
        session: the session.
        store: its checkpoints.
        name: the checkpoint's name.
        config: the session's config, as JSON.

    Raises:
        SessionNotFoundError, DataLossError, StateChangedError: as `StateExchange.captured`.
        InvalidRequestError: the name is none, or another checkpoint has it.
        OSError: the disk failed; there is no such checkpoint.
    """
    elements = session.config.layout.size
    with session.exchange.captured() as captured:
        writer = store.begin(name, {**dict.fromkeys(session.slots, elements), **row_slots(session.config)})
        try:
            for slot, start, values in captured.blocks:
                writer.write(slot, start, values)
            shadow = _shadow(session, captured)
        except BaseException:
            writer.abort()
            raise
    writer.commit(_manifest_of(session, captured, config, shadow))
    return Saved(captured.numbers.step, captured.numbers.load, captured.position)


def _shadow(session: Session, captured: Captured) -> Shadow | None:
    """Make the shadow step; a device without room for it must not keep a state from the disk."""
    try:
        return session.exchange.shadow(captured.numbers, captured.probed)
    except ResourceExhaustedError as error:
        _log.warning("checkpoint without a shadow step", session_id=session.session_id, problem=str(error))
        return None


def _manifest_of(session: Session, captured: Captured, config: dict[str, Any], shadow: Shadow | None) -> Manifest:
    numbers, result = captured.numbers, captured.last_result
    return Manifest(
        session_id=session.session_id,
        name="",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        epoch=session.ledger.epoch,
        step=numbers.step,
        load=numbers.load,
        ready=captured.ready,
        tensor_steps=numbers.tensor_steps,
        tensor_scalars=numbers.tensor_scalars,
        loss_scale=numbers.loss_scale,
        sum_bound=captured.sum_bound,
        generation=captured.holder.generation,
        acquired=captured.acquisitions,
        members=captured.members,
        last_result=None if result is None else msgspec.msgpack.encode(result),
        config=config,
        shadow=shadow,
    )


def restore(session: Session, checkpoint: Checkpoint) -> None:
    """Take over a checkpoint.

    Raises:
        DataLossError: it is damaged, of another shape than the session, or would step otherwise than when it was saved.
        ResourceExhaustedError: it does not fit beside the session's state, where it has to.
        OSError: the disk failed.
    """
    manifest = checkpoint.manifest
    _check_shape(session.config, manifest, checkpoint)
    captured = Captured(
        numbers_of(manifest),
        manifest.sum_bound,
        manifest.ready,
        _last_result(manifest),
        Holder(0, manifest.generation, manifest.acquired, None),
        manifest.acquired,
        manifest.members,
    )
    session.exchange.restore(captured, checkpoint.body.read)
    _check_warm(checkpoint, session.exchange.shadow())


def check_as_saved(session: Session, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has the state that was saved, before it comes into a session like the one that it is of.

    Raises:
        DataLossError: its arrays are damaged, or it would step otherwise than when it was saved.
        OSError: the disk failed.
    """
    if checkpoint.manifest.shadow is not None:
        probed = read_probe(session.config, checkpoint.body.read)
        _check_warm(checkpoint, session.exchange.shadow(numbers_of(checkpoint.manifest), probed))


def numbers_of(manifest: Manifest) -> Snapshot:
    """Return the numbers in a checkpoint."""
    return Snapshot(manifest.step, manifest.load, manifest.tensor_steps, manifest.loss_scale, manifest.tensor_scalars)


def _check_warm(checkpoint: Checkpoint, found: Shadow | None) -> None:
    """Compare the step that a state would make with that of the state that was saved."""
    recorded = checkpoint.manifest.shadow
    if recorded is not None and differs(found, recorded):
        norm = None if found is None else found.update_norm
        raise DataLossError(
            f"checkpoint {checkpoint.name!r} was restored cold: its state would step by {norm!r}, and the one that "
            f"was saved by {recorded.update_norm!r}; use another checkpoint, or bring this one back from a copy",
            reason=Reason.CHECKPOINT_DAMAGED,
            metadata={"checkpoint": checkpoint.name, "field": "shadow"},
        )


def _last_result(manifest: Manifest) -> StepResult | None:
    if manifest.last_result is None:
        return None
    return msgspec.msgpack.decode(manifest.last_result, type=StepResult)


def _check_shape(config: SessionConfig, manifest: Manifest, checkpoint: Checkpoint) -> None:
    elements = {slot: facts.elements for slot, facts in manifest.arrays.items()}
    wanted = {**dict.fromkeys(config.visible_slots, config.layout.size), **row_slots(config)}
    tensors = len(config.layout.tensors)
    if elements != wanted or len(manifest.tensor_steps) != tensors:
        raise DataLossError(
            f"checkpoint {checkpoint.name!r} has the arrays {elements} of {len(manifest.tensor_steps)} tensors, and "
            f"the session {wanted} of {tensors}; it belongs to another session",
            reason=Reason.CHECKPOINT_DAMAGED,
            metadata={"checkpoint": checkpoint.name},
        )
