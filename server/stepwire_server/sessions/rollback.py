"""Rollbacks and forks: an earlier state in the place of the present one, or at the beginning of another session.

A rollback is a load whose values the server has. So it has a load's number, its hold, its place in the log and its
replay, and nothing of it is new to recovery.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.durability.checkpoints import CheckpointStore, automatic_name
from stepwire_server.durability.manifest import Manifest
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.sessions.beginning import Beginning, Created
from stepwire_server.sessions.capture import BLOCK, Block
from stepwire_server.sessions.checkpointing import check_as_saved, numbers_of
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.earlier import EarlierState, Origin, find_earlier
from stepwire_server.sessions.members import Members
from stepwire_server.sessions.named_checkpoints import NamedCheckpoints, telling_of_the_disk
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.row_numbers import row_slots
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import FIRST_GENERATION, Holder
from stepwire_server.steps.reply import split_range

__all__ = ["Rollbacks"]


class _Values(NamedTuple):
    """The values of an earlier state.

    Attributes:
        numbers: its numbers.
        sum_bound: no element of its accumulated gradient is larger in magnitude.
        blocks: its arrays.
    """

    numbers: Snapshot
    sum_bound: float
    blocks: Iterable[Block]


class Rollbacks:
    """Rolls sessions back, and forks them. Thread-safe."""

    def __init__(self, registry: Registry, checkpoints: NamedCheckpoints) -> None:
        """Serve the sessions of a registry."""
        self._registry = registry
        self._checkpoints = checkpoints

    def roll_back(self, session: Session, holder: Holder, request: LoadRequest, origin: Origin) -> bool:
        """Replace the state of a session by an earlier one; False if that had been done before.

        Args:
            session: the session.
            holder: the hold of the worker that the call comes under.
            request: the numbers of the load that the rollback is; slots and values are filled in.
            origin: the earlier state.

        Raises:
            InvalidRequestError: there is no such state; the message lists what is reachable.
            UnsupportedFeatureError: the session is in memory alone.
            StepwireError: as `StateExchange.loading` and `commit_load`.
        """
        directory = self._checkpoints.directory_of(session.session_id)
        _refuse_numbers_of_rows(session)
        with telling_of_the_disk():
            if not session.exchange.follows(request, holder):
                return False
            with directory.reading(), _opened(session, _found(directory, session, origin)) as values:
                return _load(session, holder, _with_numbers(session, request, values), values.blocks)

    def fork(self, session: Session, request_id: str, config: SessionConfig, origin: Origin | None) -> Created:
        """Create a session that begins with a state of another one, or return the one that this request created before.

        Args:
            session: the session to fork.
            request_id: the name of the request.
            config: the config of the fork: that of the session, but for what concerns its life.
            origin: the state that it begins with; None for the present one.

        Raises:
            InvalidRequestError: there is no such state, or the request id came before with another config.
            UnsupportedFeatureError: the session is in memory alone, or the server has not the device.
            StepwireError: as `Registry.create`.
        """
        if (known := self._registry.created(request_id, config)) is not None:
            return known  # whatever has become of the state since
        directory = self._checkpoints.directory_of(session.session_id)
        with telling_of_the_disk():
            if origin is None:
                with directory.checkpointer.turn():
                    origin = Origin(step=directory.save_automatic(session).step)
            with directory.reading():
                earlier = _found(directory, session, origin)
                bring = functools.partial(_bring, earlier)
                return self._registry.create(request_id, config, Beginning(bring, functools.partial(_keep, earlier)))


def _refuse_numbers_of_rows(session: Session) -> None:
    """Refuse a load of a state whose rows have numbers, which no load brings.

    Raises:
        UnsupportedFeatureError: a table counts its rows.
    """
    if row_slots(session.config):
        raise UnsupportedFeatureError(
            "rollback: the tables of this session keep numbers of rows, and a rollback is a load, which brings none; "
            "fork the state instead",
            metadata={"field": "rollback", "feature": "sparse_rows"},
        )


def _found(directory: DataDirectory, session: Session, origin: Origin) -> EarlierState:
    journals = session.config.durability.level == "journal"
    return find_earlier(directory, session.session_id, origin, journals=journals)


@contextlib.contextmanager
def _opened(session: Session, earlier: EarlierState) -> Iterator[_Values]:
    """Open an earlier state for a block.

    Raises:
        StepwireError, OSError: as `EarlierState.open` and `made_again`.
    """
    if earlier.is_checkpoint:
        with earlier.open() as checkpoint:
            check_as_saved(session, checkpoint)
            manifest = checkpoint.manifest
            yield _Values(numbers_of(manifest), manifest.sum_bound, _blocks(session, checkpoint))
        return
    with earlier.made_again(session) as again, again.exchange.captured() as captured:
        yield _Values(captured.numbers, captured.sum_bound, captured.blocks)


def _blocks(session: Session, checkpoint: Checkpoint) -> Iterator[Block]:
    for slot in session.slots:
        for low, high in split_range(0, session.config.layout.size, BLOCK):
            values = np.empty(high - low, np.float32)
            checkpoint.body.read(slot, low, values)
            yield Block(slot, low, values)


def _with_numbers(session: Session, request: LoadRequest, values: _Values) -> LoadRequest:
    numbers, every = values.numbers, session.config.treatment.accumulation_steps
    return request._replace(
        place=(numbers.step % every, every) if every > 1 else None,
        slots=session.slots,
        tensor_steps=numbers.tensor_steps,
        tensor_scalars=numbers.tensor_scalars,
        loss_scale=numbers.loss_scale,
        sum_bound=values.sum_bound,
    )


def _load(session: Session, holder: Holder, request: LoadRequest, blocks: Iterable[Block]) -> bool:
    with session.exchange.loading(request, holder) as load:
        if load is None:
            return False
        for slot, start, values in blocks:
            load.add(slot, start, len(values), values.view(np.uint8))
        load.complete()
        return session.exchange.commit_load(load)


def _bring(earlier: EarlierState, session: Session) -> None:
    """Bring a new session into an earlier state of another one; its hold and its results are its own."""
    earlier.bring(session)
    ledger = session.ledger
    ledger.members, ledger.last_result = Members(ledger.members.most), None


def _keep(earlier: EarlierState, session: Session, store: CheckpointStore) -> None:
    """Save the first checkpoint of a fork: without a copy of its arrays, where a checkpoint has them."""
    directory, ledger = earlier.directory, session.ledger
    name = automatic_name(ledger.applied_step, ledger.applied_load)
    if earlier.is_checkpoint:
        with contextlib.suppress(InvalidRequestError):  # it was deleted meanwhile, and the session has its state
            with earlier.open() as checkpoint:
                manifest = _as_first(checkpoint.manifest, session, directory)
            directory.checkpoints(earlier.session_id).link(earlier.checkpoint, store, name, manifest)
            return
    directory.save(session, store, name)


def _as_first(manifest: Manifest, session: Session, directory: DataDirectory) -> Manifest:
    """Return the manifest of a fork's first checkpoint."""
    return msgspec.structs.replace(
        manifest,
        session_id=session.session_id,
        epoch=session.ledger.epoch,
        generation=FIRST_GENERATION,
        acquired=FIRST_GENERATION,
        last_result=None,
        members=(),
        config=directory.config_tree(session.config),
    )
