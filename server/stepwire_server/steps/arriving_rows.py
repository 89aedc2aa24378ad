"""Rows of one table on their way in: of a step's gradient, or of a load."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Placement
from stepwire_server.engines.payloads import floats_of
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.coverage import most_chunks, typed_payload

__all__ = ["ArrivingRows"]


class ArrivingRows:
    """The rows of one table as they arrive.

    Attributes:
        placement: the table.
        expected: the number of rows that come.
        count: the number of those that have come.
    """

    def __init__(self, placement: Placement, expected: int, field: str) -> None:
        """Await rows; `field` announces how many."""
        self.placement = placement
        self.expected = expected
        self.count = 0
        self._field = field
        self._rows: list[HostArray] = []
        self._payloads: list[tuple[HostArray, int]] = []

    def add(self, rows: HostArray, count: int, payload: HostArray, dtype: np.dtype[Any]) -> None:
        """Keep one chunk.

        Args:
            rows: the rows, `(k,) uint64`, k ≥ 1.
            count: their elements.
            payload: their received bytes, `(n,) uint8`.
            dtype: their encoding.

        Raises:
            InvalidRequestError: a row, or a number of rows or bytes is wrong; the chunks before it stay.
        """
        spec, problem = self.placement.spec, ""
        if count != len(rows) * spec.width:
            problem = f"{len(rows)} rows of {spec.width} elements, and `count` is {count}"
        elif (largest := int(rows.max())) >= spec.named_rows:
            problem = f"row {largest} is not below {spec.named_rows}, the rows of the table"
        elif self.count + len(rows) > self.expected:
            problem = f"{self.count + len(rows)} rows, and `{self._field}` says {self.expected}"
        elif len(self._rows) == most_chunks(self.expected * spec.width):
            problem = f"more than {len(self._rows)} chunks; send larger ones"
        if problem:
            raise _invalid("chunk.rows", f"table {spec.name!r}: {problem}")
        self._payloads.append((typed_payload(payload, count, dtype), count))
        self._rows.append(rows.astype(np.int64))
        self.count += len(rows)

    def require(self) -> None:
        """Check that all rows have come.

        Raises:
            InvalidRequestError: some have not.
        """
        if self.count != self.expected:
            problem = f"{self.count} rows of table {self.placement.spec.name!r} came"
            raise _invalid(self._field, f"{problem}, and `{self._field}` says {self.expected}")

    def rows(self) -> HostArray:
        """Return the rows that came, `(count,) int64`, in the order in which they came."""
        return np.concatenate([np.empty(0, np.int64), *self._rows])

    def pop_values(self) -> HostArray:
        """Return the values of the rows, `(count, width) float32`, and forget their bytes."""
        given = [floats_of(payload, 0, count) for payload, count in self._payloads]
        values = given[0] if len(given) == 1 else np.concatenate([np.empty(0, np.float32), *given])
        self._payloads.clear()
        return values.reshape(-1, self.placement.spec.width)


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
