"""Rows of a batch to come, fetched while the present one is stepped. They have the values of a pull at their use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from stepwire.connection.bells import Bells
from stepwire.connection.errands import later
from stepwire.errors import UnsupportedFeatureError
from stepwire.session import Session

__all__ = ["PrefetchedRows"]

_T = TypeVar("_T")
Indices = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class _Pull:
    """A pull in a thread of the client's own."""

    def __init__(self, pull: Callable[[Indices], Values], indices: Indices) -> None:
        self._found: Values | None = None
        self._is_over = False
        self._over = Bells()
        later(functools.partial(self._make, pull, indices))

    def _make(self, pull: Callable[[Indices], Values], indices: Indices) -> None:
        try:
            self._found = pull(indices)
        except Exception:
            pass  # the caller pulls by itself, and gets the error there
        finally:
            self._is_over = True
            self._over.ring()

    def values(self) -> Values | None:
        """Wait for the rows, `(n, width)`; None if the pull failed."""
        self._over.wait_for(lambda: self._is_over)
        return self._found


class _Asked(NamedTuple):
    """The rows that were asked for.

    Attributes:
        indices: the rows, each once, rising.
        pull: their values before any step since.
        again: the places in `indices` that a step has touched since, and their values after it; None before a step.
        moment: the step and the load of the session that the values are of.
    """

    indices: Indices
    pull: _Pull
    again: tuple[npt.NDArray[np.intp], _Pull] | None
    moment: tuple[int, int]


class PrefetchedRows:
    """The rows of one table that were asked for beforehand, as long as one client alone steps the table.

    A step may run while the rows are fetched, and neither waits for the other. A row that the step does not touch has
    the same value before and after it. The rows that it touches are fetched again once it is over, in the background
    too. Nothing is kept after a second step, after one that failed, and after any other change of the session.
    """

    def __init__(self, session: Session, name: str, timeout: float | None = None, *, moves_all: bool = False) -> None:
        """Ask for nothing yet.

        Args:
            session: the session.
            name: the table.
            timeout: seconds for a pull with all its repetitions; None for those of the client.
            moves_all: a step may change any row: it moves all of them, or evicts some.
        """
        self._session = session
        self._name = name
        self._timeout = timeout
        self._width = session.shapes[name][1]
        self._moves_all = moves_all
        self._asked: _Asked | None = None

    def ask(self, indices: npt.NDArray[Any]) -> None:
        """Fetch rows in the background, in the place of those that were asked for before.

        Args:
            indices: the rows, integers of any shape; each is fetched once.

        Raises:
            UnsupportedFeatureError: other workers step the session too.
        """
        if self._session.config.aggregation is not None:
            raise UnsupportedFeatureError(
                "prefetch: other workers step this table, and rows would be those before their steps; leave it out",
                metadata={"field": "prefetch", "feature": "torch_prefetch"},
            )
        unique = np.unique(indices.reshape(-1).astype(np.int64))
        self._asked = _Asked(unique, _Pull(self._pulled, unique), None, self._moment())

    def step(self, indices: npt.NDArray[Any], step: Callable[[], _T]) -> _T:
        """Make a step of some rows, and fetch those again that were asked for and that it touches.

        Args:
            indices: the rows of the step, `(n,)` integers.
            step: makes the step.

        Raises:
            BaseException: as `step`; nothing is kept then.
        """
        asked, self._asked = self._asked, None
        is_first = asked is not None and asked.again is None and asked.moment == self._moment()
        result = step()
        if asked is not None and is_first:
            touched = np.ones(len(asked.indices), bool) if self._moves_all else np.isin(asked.indices, indices)
            places = np.flatnonzero(touched)
            again = places, _Pull(self._pulled, asked.indices[places])
            self._asked = asked._replace(again=again, moment=self._moment())
        return result

    def rows(self, indices: npt.NDArray[np.int64]) -> Values:
        """Return the present values of rows, `(n, width)`: those that were asked for, and others from a pull.

        Args:
            indices: the rows, each once, rising.

        Raises:
            StepwireError: as `Session.pull`.
        """
        found = self._present()
        if found is None or not len(indices):
            return self._pulled(indices)
        known, values = found
        places = np.minimum(np.searchsorted(known, indices), len(known) - 1)
        missing = known[places] != indices
        out: Values = values[places]
        if missing.any():
            out[missing] = self._pulled(indices[missing])
        return out

    def forget(self) -> None:
        """Keep nothing."""
        self._asked = None

    def _present(self) -> tuple[Indices, Values] | None:
        """Return the rows that were asked for with their present values; None for none."""
        if (asked := self._asked) is None or asked.moment != self._moment() or not len(asked.indices):
            return None
        if (values := asked.pull.values()) is None:
            return None
        if asked.again is not None:
            places, again = asked.again
            if (touched := again.values()) is None:
                return None
            values[places] = touched
        return asked.indices, values

    def _moment(self) -> tuple[int, int]:
        known = self._session.statistics()
        return known.applied_step, known.applied_load

    def _pulled(self, indices: Indices) -> Values:
        if not len(indices):
            return np.empty((0, self._width), np.float32)
        pulled: Any = self._session.pull(rows={self._name: indices}, timeout=self._timeout)
        values: Values = pulled[self._name].values
        return values
