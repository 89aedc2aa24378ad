"""The small messages of the log: what a step, a load and a hold were, so that each can be made again.

They are msgpack maps by name. A reader passes over names that it does not know, and a new name has a default, so data
of an older release can be read.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from stepwire.errors import DataLossError, Reason
from stepwire_server.records.round_result import RoundResult

__all__ = ["Attempt", "HoldEntry", "LoadEntry", "StepEntry", "decode_entry", "encode_entry"]

_T = TypeVar("_T", bound="_Entry")


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """The chunks that one attempt of a step has brought, or of an overlapped one those that it has applied.

    Attributes:
        entry: the entry of the chunks' records.
        chunks: the number of chunks that count, from the first one.
    """

    entry: int
    chunks: int


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A message of the log."""


class StepEntry(_Entry, frozen=True, kw_only=True):
    """One committed step.

    Attributes:
        step: its number.
        opening: the message that opened it, without its number and what concerns its reply alone.
        generation: the number of the hold that it was committed under.
        acquired: the generation in which the client acquired the worker.
        attempts: the chunks, attempt by attempt; an attempt is a stream.
        inline: offset and count of each chunk in the record's own payload, one behind another.
        decision: the coordinator's coefficient, group coefficients and skip; None where there was none.
        worker: the worker of the hold.
        parts: for each worker whose gradient is in it, the part in the result; empty without aggregation.
        reduced: the gradient is that of a round: float32, unscaled, whatever the opening says.
        missing: the tensors without a gradient, where it is reduced.
        tables: the index of each table, with the number of its rows, where it is reduced.
        lr_factor: the factor of the learning rates.
    """

    step: int
    opening: bytes
    generation: int
    acquired: int
    attempts: tuple[Attempt, ...] = ()
    inline: tuple[tuple[int, int], ...] = ()
    decision: tuple[float, tuple[float, ...], bool] | None = None
    worker: int = 0
    parts: tuple[tuple[int, RoundResult], ...] = ()
    reduced: bool = False
    missing: tuple[int, ...] = ()
    tables: tuple[tuple[int, int], ...] = ()
    lr_factor: float = 1.0


class LoadEntry(_Entry, frozen=True, kw_only=True):
    """One committed load.

    Attributes:
        load: its number.
        slots: the slots that it brought; a chunk names one by its index.
        dtype: the dtype of the chunks, by NumPy's name.
        generation: the number of the hold that it was committed under.
        acquired: the generation in which the client acquired the worker.
        attempt: its chunks.
        step: the step that it set; None to leave it.
        tensor_steps: t of each tensor; empty to leave them.
        tensor_scalars: the scalar of each tensor; empty to leave or derive them.
        loss_scale: scale and clean steps; None to leave them.
        sum_bound: no element of an accumulated gradient is larger in magnitude; None if that is not known.
        worker: the worker of the hold.
        by_rows: it brought parameters of some rows of tables, and not whole slots.
        tables: these tables, by index, each with its number of rows.
    """

    load: int
    slots: tuple[str, ...]
    dtype: str
    generation: int
    acquired: int
    attempt: Attempt
    step: int | None = None
    tensor_steps: tuple[int, ...] = ()
    tensor_scalars: tuple[float, ...] = ()
    loss_scale: tuple[float, int] | None = None
    sum_bound: float | None = None
    worker: int = 0
    by_rows: bool = False
    tables: tuple[tuple[int, int], ...] = ()


class HoldEntry(_Entry, frozen=True, kw_only=True):
    """The worker was acquired by another client, or a contribution of it was dropped.

    Attributes:
        generation: the generation in which its client acquired it.
        worker: the worker.
        dropped: the number of the contribution that was dropped; 0 for none.
        result: the answer to it, encoded; empty for none.
    """

    generation: int
    worker: int = 0
    dropped: int = 0
    result: bytes = b""


def encode_entry(entry: _Entry) -> bytes:
    """Encode a message of the log."""
    return msgspec.msgpack.encode(entry)


def decode_entry(kind: type[_T], data: bytes) -> _T:
    """Decode a message of the log.

    Raises:
        DataLossError: it is none.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise DataLossError(
            f"a record of the log holds no {kind.__name__}: {error}; the data directory was written by a newer "
            "release, or is damaged",
            reason=Reason.LOG_DAMAGED,
        ) from None
