"""Steps and loads of the log, made again in a session that a checkpoint restored: bit for bit what they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from stepwire.errors import DataLossError, Reason
from stepwire.wire.dtypes import FLOAT32, dtype_named, wire_bytes
from stepwire_server.durability.entries import Attempt, HoldEntry, LoadEntry, StepEntry, decode_entry
from stepwire_server.durability.records import Header, Kind
from stepwire_server.durability.session_log import CHUNK, logged_rows
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.session import Session
from stepwire_server.steps.reply import ReplyPipeline
from stepwire_server.steps.step import Step

__all__ = ["ChunkRecords", "Codec", "NoReply", "Openings", "Redo", "RedoRecord"]


class RedoRecord(Protocol):
    """A record of a journal, read from the disk or received over a connection."""

    @property
    def header(self) -> Header:
        """The header, with kind, session, entry, number and epoch."""
        ...

    @property
    def meta(self) -> bytes:
        """The small message."""
        ...

    def read_payload(self) -> HostArray:
        """Return the bytes, `(n,) uint8`."""
        ...


ChunkRecords = dict[tuple[int, int], list[RedoRecord]]
"""The chunks of commits to come, by the epoch and the number of their entry."""


class Openings(Protocol):
    """The openings of steps that are made again."""

    def decode_opening(self, data: bytes, config: SessionConfig) -> StepRequest:
        """Decode the opening of a step, which has no number and no reply.

        Raises:
            InvalidRequestError: as `Codec.decode_config`.
        """
        ...


class Codec(Openings, Protocol):
    """The contract's messages, for a domain that knows none of them."""

    def encode_config(self, config: SessionConfig) -> bytes:
        """Encode a session's config."""
        ...

    def decode_config(self, data: bytes) -> SessionConfig:
        """Decode a session's config.

        Raises:
            InvalidRequestError, UnsupportedFeatureError: this release cannot serve it.
        """
        ...

    def config_text(self, config: SessionConfig) -> str:
        """Return a session's config as JSON, for people who read a checkpoint."""
        ...


class NoReply:
    """A reply that nobody reads; see `ReplyWriter`."""

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplyWriter`: no step is redone with a reply."""
        raise AssertionError("a step that is redone has no reply")

    def rows(self, offset: int, rows: HostArray, width: int) -> HostArray:
        """See `ReplyWriter`."""
        raise AssertionError("a step that is redone has no reply")

    def before(self) -> HostArray:
        """See `ReplyWriter`."""
        raise AssertionError("a step that is redone has no reply")

    def flush(self) -> None:
        """See `ReplyWriter`."""


class _Chunk(NamedTuple):
    """A chunk of a record of its own, or of a commit's payload."""

    offset: int
    elements: int
    slot: int
    payload: HostArray


class Redo:
    """The commits of one session that its checkpoint does not have, made again in the order of the log.

    Attributes:
        session: the session.
        commits: the number of commits made so far.
    """

    def __init__(self, session: Session, codec: Openings, chunks: ChunkRecords | None = None) -> None:
        """Go on from the session as it stands; it has no log yet. `chunks` came before, of commits to come."""
        self.session = session
        self.commits = 0
        self._codec = codec
        self._chunks: ChunkRecords = {} if chunks is None else chunks

    def add(self, record: RedoRecord) -> None:
        """Make the next record of the session again.

        Raises:
            DataLossError: a commit is missing before this one, or the record is damaged.
        """
        kind = record.header.kind
        if kind is Kind.CHUNK:
            self._chunks.setdefault((record.header.epoch, record.header.entry), []).append(record)
        elif kind is Kind.COMMIT:
            self._step(decode_entry(StepEntry, record.meta), record)
        elif kind is Kind.LOAD:
            self._load(decode_entry(LoadEntry, record.meta), record)
        elif kind is Kind.HOLD:
            hold = decode_entry(HoldEntry, record.meta)
            self._acquired(hold.worker, hold.generation)
            if hold.dropped:
                ledger = self.session.ledger
                ledger.members[hold.worker].restore(hold.dropped, ledger.applied_load, hold.result)

    def _step(self, entry: StepEntry, record: RedoRecord) -> None:
        session = self.session
        if entry.step > session.ledger.applied_step:
            _check_next(session, "step", entry.step, session.ledger.applied_step + 1)
            _redo_step(session, entry, record, _Chunks(self._chunks, record), self._codec)
            self._made(entry)
        self._drop(record, *entry.attempts)

    def _load(self, entry: LoadEntry, record: RedoRecord) -> None:
        session = self.session
        if entry.load > session.ledger.applied_load:
            if not session.ledger.members.follows(entry.load, session.ledger.applied_load):
                _check_next(session, "load", entry.load, session.ledger.applied_load + 1)
            _redo_load(session, entry, _Chunks(self._chunks, record))
            self._made(entry)
        self._drop(record, entry.attempt)

    def _made(self, entry: StepEntry | LoadEntry) -> None:
        self._acquired(entry.worker, entry.acquired)
        self.commits += 1

    def _acquired(self, worker: int, generation: int) -> None:
        ledger = self.session.ledger
        ledger.members[worker].worker.restore(generation, ledger.epoch)

    def _drop(self, commit: RedoRecord, *attempts: Attempt) -> None:
        """Forget the chunks of a commit; those of other steps and loads may still be on their way."""
        for attempt in attempts:
            self._chunks.pop((commit.header.epoch, attempt.entry), None)


class _Chunks:
    """The chunks of one commit."""

    def __init__(self, chunks: ChunkRecords, commit: RedoRecord) -> None:
        self._chunks = chunks
        self._commit = commit

    def of(self, attempt: Attempt) -> Iterable[_Chunk]:
        """Yield the chunks of an attempt that count.

        Raises:
            DataLossError: one is missing.
        """
        found = self._chunks.get((self._commit.header.epoch, attempt.entry), [])[: attempt.chunks]
        if len(found) != attempt.chunks:
            raise DataLossError(
                f"the log lacks {attempt.chunks - len(found)} chunks of a commit; see `stepwire checkpoint repair`",
                reason=Reason.LOG_DAMAGED,
            )
        for record in found:
            offset, count, slot = CHUNK.unpack(record.meta)
            yield _Chunk(offset, count, slot, record.read_payload())


def _inline(entry: StepEntry, record: RedoRecord, dtype: np.dtype[Any]) -> Iterable[_Chunk]:
    """Yield the chunks in a commit's own payload."""
    if not entry.inline:
        return
    payload, low = record.read_payload(), 0
    for offset, count in entry.inline:
        high = low + wire_bytes(dtype, count)
        yield _Chunk(offset, count, 0, payload[low:high])
        low = high


def _redo_step(session: Session, entry: StepEntry, record: RedoRecord, chunks: _Chunks, codec: Openings) -> None:
    opened = codec.decode_opening(entry.opening, session.config)
    request = opened._replace(
        step=entry.step,
        epoch=0,
        load=None,
        reply=False,
        shared=False,
        reply_base=None,
        lr_factor=entry.lr_factor,
    )
    holder = session.ledger.members[entry.worker].worker.holder
    if request.overlap:
        for index, attempt in enumerate(entry.attempts):
            with session.begin(request, holder, 0.0) as step:
                _apply(session, step, chunks.of(attempt))
                if index == len(entry.attempts) - 1:
                    session.finish(step)
        return
    if entry.reduced:
        request = request._replace(
            gradient_dtype=FLOAT32, loss_scale=1.0, missing=frozenset(entry.missing), tables=entry.tables
        )
    again = session.contributions
    with (
        session.begin(request, holder, 0.0)
        if again is None
        else again.begin_again(request, holder, entry.parts, reduced=entry.reduced)
    ) as step:
        for attempt in entry.attempts:
            for chunk in chunks.of(attempt):
                _stage(step, chunk)
        for chunk in _inline(entry, record, request.gradient_dtype):
            step.add(chunk.offset, chunk.elements, chunk.payload)
        if entry.decision is not None:
            step.decision = Decision(*entry.decision)
        if again is None:
            session.commit(step, NoReply())
        else:
            again.commit_again(step, NoReply())


def _stage(step: Step, chunk: _Chunk) -> None:
    if not chunk.slot:
        step.add(chunk.offset, chunk.elements, chunk.payload)
        return
    rows, payload = logged_rows(chunk.payload, chunk.slot)
    step.add_rows(chunk.offset, chunk.elements, rows, payload)


def _apply(session: Session, step: Step, chunks: Iterable[_Chunk]) -> None:
    with ReplyPipeline(NoReply(), session.depth) as reply:
        for chunk in chunks:
            step.add(chunk.offset, chunk.elements, chunk.payload)
            if (staged := step.gradient.pop()) is not None:
                session.apply(step, staged, reply)


def _redo_load(session: Session, entry: LoadEntry, chunks: _Chunks) -> None:
    request = LoadRequest(
        entry.load,
        entry.slots,
        dtype_named(entry.dtype, "dtype"),
        step=entry.step,
        tensor_steps=entry.tensor_steps,
        tensor_scalars=entry.tensor_scalars,
        loss_scale=None if entry.loss_scale is None else LossScale(*entry.loss_scale),
        sum_bound=entry.sum_bound,
        by_rows=entry.by_rows,
        tables=entry.tables,
    )
    holder = session.ledger.members[entry.worker].worker.holder
    with contextlib.ExitStack() as stack:
        load = stack.enter_context(session.exchange.loading(request, holder))
        assert load is not None
        for chunk in chunks.of(entry.attempt):
            if entry.by_rows:
                load.add_rows(chunk.offset, chunk.elements, *logged_rows(chunk.payload, chunk.slot))
            else:
                load.add(entry.slots[chunk.slot], chunk.offset, chunk.elements, chunk.payload)
        load.complete()
        session.exchange.commit_load(load)


def _check_next(session: Session, what: str, number: int, expected: int) -> None:
    if number != expected:
        raise DataLossError(
            f"session {session.session_id}: the log has {what} {number} and lacks {what} {expected}",
            reason=Reason.LOG_DAMAGED,
            metadata={"session_id": session.session_id},
        )
