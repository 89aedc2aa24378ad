"""The ids of a table's rows: against a dictionary, through evictions and restarts, in a table that is full of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire.layout import Placement, TensorSpec
from stepwire_server.steps.row_ids import RowIds, row_id_bytes


def placed(capacity: int, **options: Any) -> Placement:
    spec = TensorSpec("t", (capacity, 2), table="torch_sparse", hashed=True, **options)
    return Placement(spec, 0, 2 * capacity)


def array(*ids: int) -> np.ndarray:
    return np.array(sorted(ids), np.int64)


class Model:
    """Places by a dictionary: a new id has the lowest free place, in the order of the ids of its step."""

    def __init__(self, capacity: int, max_age: int) -> None:
        self.capacity, self.max_age = capacity, max_age
        self.places: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def step(self, ids: list[int], t: int) -> bool:
        """Take a step; False where it has no room."""
        new = [each for each in ids if each not in self.places]
        aged = [i for i in self.places if i not in ids and self.max_age and t - self.last[i] > self.max_age]
        room = self.capacity - len(self.places)
        if len(new) > room + len(aged):
            return False
        for each in aged if len(new) > room else []:
            del self.places[each], self.last[each]
        free = sorted(set(range(self.capacity)) - set(self.places.values()))
        self.places |= dict(zip(new, free, strict=False))
        self.last |= dict.fromkeys(ids, t)
        return True


@pytest.mark.parametrize(("capacity", "max_age"), [(16, 0), (16, 3), (5, 1), (200, 8)])
def test_random_steps_are_those_of_a_dictionary(capacity: int, max_age: int) -> None:
    """A copy that is restored from the ids now and then goes on with the same places."""
    rng, where = np.random.default_rng(capacity + max_age), placed(capacity, max_age_steps=max_age)
    ids, model, refused = RowIds(where), Model(capacity, max_age), 0
    pool = np.unique(np.concatenate([rng.integers(0, 2**63 - 1, 2 * capacity), np.arange(capacity)]))
    for t in range(1, 150):
        named = np.unique(rng.choice(pool[min(t // 10, capacity) :], rng.integers(0, capacity // 2 + 2)))
        if t % 20 == 0:
            again = RowIds(where)
            again.ids[:] = ids.ids
            if again.last is not None and ids.last is not None:
                again.last[:] = ids.last
            again.restored()
            ids = again
        if not model.step(named.tolist(), t):
            refused += 1
            before = (ids.ids.copy(), ids.rows)
            with pytest.raises(ResourceExhaustedError, match=f"of {capacity} rows"):
                ids.check(named, t)
            assert np.array_equal(ids.ids, before[0]) and ids.rows == before[1]
            continue
        ids.check(named, t)
        known = ids.find(named)
        places, new = ids.place(named, t)
        assert places.tolist() == [model.places[each] for each in named.tolist()]
        assert sorted(places[known != places].tolist()) == new.tolist()
        everything = np.array(sorted(model.places), np.int64)
        assert ids.find(everything).tolist() == [model.places[each] for each in everything.tolist()]
        assert ids.rows == len(model.places)
        strangers = np.setdiff1d(pool, everything)
        assert (ids.find(strangers) == -1).all()
    assert 0 < refused < 140


def test_a_full_table_refuses_new_ids_alone() -> None:
    ids = RowIds(placed(3))
    ids.place(array(7, 9, 11), 1)
    ids.check(array(7, 11), 2)
    with pytest.raises(ResourceExhaustedError, match="3 of 3 rows, and 1 ids are new; create") as refused:
        ids.check(array(7, 12), 2)
    assert refused.value.reason is Reason.TABLE_FULL
    assert refused.value.metadata == {"table": "t", "capacity": "3", "rows": "3", "new_rows": "1"}


def test_ids_that_hash_alike_are_all_found() -> None:
    """Every id of a table of 4096 whose first entry is among a few."""
    ids = RowIds(placed(4096), key=3 << 64 | 5)
    pool = np.arange(1 << 20, dtype=np.int64)
    alike = pool[ids._hashed(pool) < 8][:1000]
    ids.place(alike, 1)
    assert len(alike) == 1000 and np.array_equal(ids.find(alike), np.arange(1000))
    assert (ids.find(pool[ids._hashed(pool) >= 8][:1000]) == -1).all()


def test_the_memory_of_ids_is_told() -> None:
    for options in ({}, {"max_age_steps": 5}):
        ids = RowIds(placed(1000, **options))
        arrays = [ids.ids, ids._entries] + ([] if ids.last is None else [ids.last])
        assert row_id_bytes(placed(1000, **options)) == sum(each.nbytes for each in arrays)
