"""Rows of tables: a user's gradients by row, rows that come back, and both as they travel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout, Placement
from stepwire.v1 import tensor_pb2
from stepwire.wire.dtypes import INT8, is_wire_dtype, wire_bytes
from stepwire.wire.int8_blocks import encode_blocks

__all__ = [
    "IdTarget",
    "PulledRows",
    "RowGradient",
    "RowPart",
    "RowReader",
    "RowTarget",
    "Rows",
    "Table",
    "check_dense",
    "row_parts",
    "rows_of",
    "split_rows",
    "targets_of",
]

_INDEX_BYTES = 10
"""The bytes of a row's index in a message at most."""

Indices: TypeAlias = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Some rows of a table: gradients of a step, or parameters.

    Attributes:
        indices: the indices of the rows, `(n,)` integers. In a gradient a row may come often and in any order: its
            gradients are added up exactly. In a reply each row comes once, and indices rise.
        values: the rows, `(n, …)`, each in the shape of a row of the table.
    """

    indices: npt.ArrayLike
    values: npt.ArrayLike


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table that its server makes, in the place of an array at a session's creation: no client ever holds it whole.

    Attributes:
        shape: the extents: rows first.
        semantics: the meaning of a step for its rows: `"torch_sparse"`, `"row_counter"`, `"skipped"`, `"global"`, or
            with Adagrad `"row_wise"`.
        uniform_bound: the bound b, finite and ≥ 0, of first parameters that are uniform in [−b, b); 0 for zeros.
        seed: their seed, in [0, 2⁶⁴): the same numbers on every server.
        hashed: True for rows that are named by ids below 2⁶³ wherever rows are named. The first extent is then the
            capacity: a row is made when a step first names its id, with first values of its own.
        max_age_steps: the steps without a row after which the row may be evicted where a step needs room; 0 for never.
    """

    shape: tuple[int, ...]
    semantics: str = "torch_sparse"
    uniform_bound: float = 0.0
    seed: int = 0
    hashed: bool = False
    max_age_steps: int = 0


class RowGradient(NamedTuple):
    """The gradient of one table, checked.

    Attributes:
        tensor: the index of the table in layout order.
        offset: its first flat element.
        indices: the rows, `(n,) uint64`.
        values: their gradients, `(n, width)` of a wire dtype, contiguous.
    """

    tensor: int
    offset: int
    indices: Indices
    values: npt.NDArray[Any]


class RowTarget(NamedTuple):
    """The place of rows that come back.

    Attributes:
        tensor: the index of the table in layout order.
        indices: the rows in the order in which they come, `(n,) uint64`.
        values: the place of the rows, `(n, width)`; of more rows where `places` is given.
        places: the place of each row among `values`, `(n,) int64`; None for their order.
    """

    tensor: int
    indices: Indices
    values: npt.NDArray[Any]
    places: npt.NDArray[np.int64] | None = None


class IdTarget(NamedTuple):
    """The place of the ids of a table's rows.

    Attributes:
        tensor: the index of the table in layout order.
        found: the ids of each part of the table, `(n,) uint64`, rising.
        part: the part that comes; each has its own key.
    """

    tensor: int
    found: dict[int, list[Indices]]
    part: int = 0

    def ids(self) -> Indices:
        """Return the ids of all parts, rising."""
        parts = [np.empty(0, np.uint64), *(each for part in self.found.values() for each in part)]
        return np.sort(np.concatenate(parts))


PulledRows: TypeAlias = Sequence[RowTarget | IdTarget]
"""The places of a pull: of rows, or of ids."""


class RowPart(NamedTuple):
    """Rows `[low, high)` of a gradient, for one message."""

    rows: RowGradient
    low: int
    high: int

    @property
    def elements(self) -> int:
        """The elements of the rows."""
        return (self.high - self.low) * int(self.rows.values.shape[1])

    def describe(self, chunk: tensor_pb2.Chunk) -> None:
        """Write the head of the message."""
        chunk.offset, chunk.count = self.rows.offset, self.elements
        chunk.rows.extend(self.rows.indices[self.low : self.high].tolist())

    def write(self, payload: npt.NDArray[Any]) -> None:
        """Encode the rows; a value beyond float16 becomes infinite, as the contract says, without a warning."""
        values = self.rows.values[self.low : self.high].reshape(-1)
        with np.errstate(all="ignore"):
            if payload.dtype == INT8:
                encode_blocks(values.astype(np.float32, copy=False), payload)
            else:
                payload[:] = values


class RowReader:
    """Reads rows that come back, table by table."""

    def __init__(self, layout: Layout, targets: Sequence[RowTarget]) -> None:
        """Await the rows of some places."""
        self._targets = {layout.tensors[target.tensor].offset: target for target in targets}
        self._done = dict.fromkeys(self._targets, 0)

    @property
    def missing(self) -> int:
        """The rows that have not come."""
        return sum(len(target.indices) - self._done[offset] for offset, target in self._targets.items())

    def read(self, chunk: tensor_pb2.Chunk, values: npt.NDArray[Any]) -> int | None:
        """Read the rows of a message; return the index of a table whose rows have all come now.

        Raises:
            InvalidRequestError: they are other rows than those that are awaited (INVALID_FRAME).
        """
        target, low = self._targets.get(chunk.offset), self._done.get(chunk.offset, 0)
        high = low + len(chunk.rows)
        if target is None or not np.array_equal(target.indices[low:high], np.array(chunk.rows, np.uint64)):
            raise InvalidRequestError.of("chunk.rows", "the server sent rows that were not asked for", reason=_FRAME)
        target.values[slice(low, high) if target.places is None else target.places[low:high]] = values.reshape(
            high - low, -1
        )
        self._done[chunk.offset] = high
        return target.tensor if high == len(target.indices) else None


_FRAME = Reason.INVALID_FRAME


def split_rows(gradients: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], tuple[RowGradient, ...]]:
    """Part the gradients of tables from the others.

    Args:
        gradients: gradients by name; None for none.
        layout: the layout of the session.

    Returns:
        The other gradients, and those of tables, by rising index.

    Raises:
        InvalidRequestError: a table has a gradient that is no `Rows`, or rows that do not fit, or another tensor has
            `Rows`.
    """
    tables = {table.spec.name: index for index, table in layout.tables.items()}
    dense = {name: value for name, value in gradients.items() if name not in tables}
    for name, value in dense.items():
        check_dense(value, f"gradients[{name!r}]")
    found = []
    for name, index in sorted(tables.items(), key=lambda each: each[1]):
        if (value := gradients.get(name)) is not None:
            found.append(_checked(value, index, layout.tensors[index]))
    return dense, tuple(found)


def check_dense(value: object, field: str) -> None:
    """Refuse rows in the place of an array.

    Raises:
        InvalidRequestError: the value is `Rows`.
    """
    if isinstance(value, Rows):
        raise _wrong(field, "rows are for tables; name it in `tables` at the session's creation")


def _checked(value: Any, index: int, table: Placement) -> RowGradient:
    field, spec = f"gradients[{table.spec.name!r}]", table.spec
    if not isinstance(value, Rows):
        raise _wrong(field, f"{type(value).__name__} for a table; pass stepwire.Rows(indices, gradients)")
    indices = rows_of(value.indices, table, f"{field}.indices")
    values = np.asarray(value.values)
    if not is_wire_dtype(values.dtype):
        raise _wrong(f"{field}.values", f"dtype {values.dtype} is not served; cast it to float32, bfloat16 or float16")
    if values.shape != (len(indices), *spec.shape[1:]):
        raise _wrong(f"{field}.values", f"shape {values.shape} for {len(indices)} rows, each of shape {spec.shape[1:]}")
    flat = np.ascontiguousarray(values).reshape(len(indices), spec.width)
    return RowGradient(index, table.offset, indices, flat)


def rows_of(indices: npt.ArrayLike, table: Placement, field: str) -> Indices:
    """Return the indices of rows, checked: `(n,) uint64`.

    Raises:
        InvalidRequestError: they are no integers, not one-dimensional, or out of range.
    """
    array = np.asarray(indices)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _wrong(field, f"shape {array.shape} of {array.dtype}; indices of rows are one-dimensional integers")
    if array.size and not (0 <= int(array.min()) and int(array.max()) < table.spec.named_rows):
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise _wrong(field, f"row {bad} is not in [0, {table.spec.named_rows}), the rows of {table.spec.name!r}")
    return array.astype(np.uint64)


def targets_of(rows: Sequence[RowGradient], dtype: np.dtype[Any]) -> tuple[RowTarget, ...]:
    """Return places for the rows that came: each once, rising."""
    targets = []
    for gradient in rows:
        indices = np.unique(gradient.indices)
        values = np.empty((len(indices), gradient.values.shape[1]), dtype)
        targets.append(RowTarget(gradient.tensor, indices, values))
    return tuple(targets)


def row_parts(rows: Sequence[RowGradient], dtype: np.dtype[Any], chunk_bytes: int) -> Iterator[RowPart]:
    """Cut gradients of rows into those of one message each: indices and payload fit together."""
    for gradient in rows:
        count, width = gradient.values.shape
        most = max(chunk_bytes // (wire_bytes(dtype, width) + _INDEX_BYTES), 1)
        for low in range(0, count, most):
            yield RowPart(gradient, low, min(low + most, count))


def _wrong(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
