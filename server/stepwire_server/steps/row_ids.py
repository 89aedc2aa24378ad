"""The rows of a table that are named by ids: the place of each id, and the room for new ones.

Ids are found by open addressing: an array of twice the capacity or more has the place of an id where a hash of the id
says, or in the next entry that is free. All ids of a step are looked up at once, entry after entry, by NumPy.

The hash has a random key, since a client chooses its ids: nobody can choose many with one hash. The key decides where
an entry lies, and nothing else.

A new id has the lowest place that is free, in the order of the ids of its step. So places follow from the steps alone,
and a state that is restored goes on with the same ones. Evictions are rare, and make the array anew.
"""

from __future__ import annotations

import secrets
from typing import Final

import numpy as np

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire.layout import Placement
from stepwire_server.engines.protocol import PARAM, HostArray
from stepwire_server.rules.first_values import uniform_rows

__all__ = ["RowIds", "row_id_bytes"]

_NONE: Final = -1
_LARGEST: Final = 2**32 - 1


class RowIds:
    """The ids of one table. Not thread-safe.

    Attributes:
        ids: the id at each place, `(capacity,) int64`; -1 for none.
        last: for each place t of the last step that named its row, `(capacity,) uint32`; None where no row gives way.
        rows: the number of rows.
        evicted: the number of rows evicted so far.
    """

    def __init__(self, placed: Placement, first_sum: float = 0.0, key: int | None = None) -> None:
        """Start without rows.

        Args:
            placed: the table.
            first_sum: the first value of Adagrad's sum.
            key: the key of the hash, in [0, 2¹²⁸); None for a random one.
        """
        upper, lower = divmod(secrets.randbits(128) if key is None else key, 1 << 64)
        self._factors = np.uint64(upper | 1), np.uint64(lower | 1)
        spec = placed.spec
        self._spec, self._first_sum = spec, first_sum
        capacity = spec.shape[0]
        self.ids = np.full(capacity, _NONE, np.int64)
        self.last = np.zeros(capacity, np.uint32) if spec.max_age_steps else None
        self.rows = self.evicted = 0
        self._end = 0
        """One past the last place that was ever given out; those behind it are free."""
        self._holes = np.empty(0, np.int64)
        """The free places before the end, rising."""
        self._bits = np.uint64(64 - _entry_bits(capacity))
        self._entries = np.full(1 << _entry_bits(capacity), _NONE, np.int32)

    def held(self) -> HostArray:
        """Return the ids of all rows, `(rows,) int64`, in the order of their places."""
        ids: HostArray = self.ids[self.ids != _NONE]
        return ids

    def find(self, ids: HostArray) -> HostArray:
        """Return the places of ids, `(n,) int64`; -1 for those that have none."""
        places = np.full(len(ids), _NONE, np.int64)
        asked, at = np.arange(len(ids)), self._hashed(ids)
        while len(asked):
            found = self._entries[at].astype(np.int64)
            same = (found != _NONE) & (self.ids[found] == ids[asked])
            places[asked[same]] = found[same]
            further = (found != _NONE) & ~same
            asked, at = asked[further], (at[further] + 1) & (len(self._entries) - 1)
        return places

    def check(self, ids: HostArray, t: int) -> None:
        """Refuse a step whose new ids have no room, even with evictions.

        Args:
            ids: the ids of the step, each once.
            t: the step of the table.

        Raises:
            ResourceExhaustedError: there is no room; nothing was changed.
        """
        places = self.find(ids)
        new, free = int((places == _NONE).sum()), len(self.ids) - self.rows
        if new <= free or new <= free + len(self._aged(places, t)):
            return
        name = self._spec.name
        raise ResourceExhaustedError(
            f"table {name!r} has {self.rows} of {len(self.ids)} rows, and {new} ids are new; create the "
            "session with a larger table, or with max_age_steps, after which rows give way",
            reason=Reason.TABLE_FULL,
            metadata={"table": name, "capacity": len(self.ids), "rows": self.rows, "new_rows": new},
        )

    def place(self, ids: HostArray, t: int) -> tuple[HostArray, HostArray]:
        """Give each new id a place, once `check` has passed.

        Args:
            ids: the ids of the step, each once, rising.
            t: the step of the table.

        Returns:
            The places of all ids, and those of the new ones, `(k,) int64`, rising.
        """
        places = self.find(ids)
        new = np.flatnonzero(places == _NONE)
        if len(new) > len(self.ids) - self.rows:
            self._evict(self._aged(places, t))
        holes, self._holes = self._holes[: len(new)], self._holes[len(new) :]
        fresh = np.arange(self._end, self._end + len(new) - len(holes))
        self._end += len(fresh)
        given = np.concatenate([holes, fresh])
        places[new] = given
        self.ids[given] = ids[new]
        self.rows += len(given)
        self._enter(given)
        if self.last is not None:
            self.last[places] = min(t, _LARGEST)
        return places, given

    def first_values(self, slot: str, ids: HostArray) -> HostArray:
        """Return the first values of a slot of rows, `(n, width) float32`."""
        spec = self._spec
        if slot == PARAM and spec.uniform_bound:
            return uniform_rows(ids, spec.width, spec.uniform_bound, spec.seed)
        return np.full((len(ids), spec.width), self._first_sum if slot == "sum" else 0.0, np.float32)

    def restored(self) -> None:
        """Go on from the ids, and the last steps of their rows, that were written into the arrays."""
        held = np.flatnonzero(self.ids != _NONE)
        self.rows, self._end = len(held), int(held[-1]) + 1 if len(held) else 0
        self._rebuild()

    def _aged(self, named: HostArray, t: int) -> HostArray:
        """Return the places of rows that give way, rising: those of no step of late, nor of this one."""
        if self.last is None:
            return np.empty(0, np.int64)
        age = min(t, _LARGEST) - self.last[: self._end].astype(np.int64)
        aged = (self.ids[: self._end] != _NONE) & (age > self._spec.max_age_steps)
        aged[named[named != _NONE]] = False
        return np.flatnonzero(aged)

    def _evict(self, places: HostArray) -> None:
        self.ids[places] = _NONE
        self.rows -= len(places)
        self.evicted += len(places)
        self._rebuild()

    def _rebuild(self) -> None:
        self._entries.fill(_NONE)
        is_free = self.ids[: self._end] == _NONE
        self._holes = np.flatnonzero(is_free)
        self._enter(np.flatnonzero(~is_free))

    def _enter(self, places: HostArray) -> None:
        """Enter places whose ids are none of those entered: of two that want one entry, the first has it."""
        at = self._hashed(self.ids[places])
        while len(places):
            free = np.flatnonzero(self._entries[at] == _NONE)
            _, first = np.unique(at[free], return_index=True)
            done = free[first]
            self._entries[at[done]] = places[done]
            left = np.ones(len(places), bool)
            left[done] = False
            places, at = places[left], (at[left] + 1) & (len(self._entries) - 1)

    def _hashed(self, ids: HostArray) -> HostArray:
        """Return the first entry of each id, by the upper bits of products (Dietzfelbinger et al. 1997), twice."""
        first, second = self._factors
        with np.errstate(over="ignore"):
            mixed = ids.astype(np.uint64) * first
            mixed = (mixed ^ (mixed >> np.uint64(32))) * second
        return (mixed >> self._bits).astype(np.int64)


def row_id_bytes(placed: Placement) -> int:
    """Return the bytes of the ids of a table."""
    capacity = placed.spec.shape[0]
    return capacity * (12 if placed.spec.max_age_steps else 8) + (4 << _entry_bits(capacity))


def _entry_bits(capacity: int) -> int:
    return max((2 * capacity - 1).bit_length(), 3)
