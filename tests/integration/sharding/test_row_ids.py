"""Rows by ids over several servers, which a hash of the id chooses: the bits of one server, full tables, failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows, Table
from stepwire.sharding import partition
from stepwire.sharding.rows import numbers_of_ids
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

WIDTH, CAPACITY = 4, 60
ADAM = stepwire.Adam(lr=0.1)
POOL = np.random.default_rng(3).integers(0, 2**63, 24, dtype=np.int64)


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(numpy_server()).target for _ in range(3)]


@pytest.fixture(scope="module")
def many(targets: list[str]) -> Iterator[stepwire.Client]:
    with stepwire.connect(targets) as client:
        yield client


@pytest.fixture(scope="module")
def one(targets: list[str]) -> Iterator[stepwire.Client]:
    with stepwire.connect(targets[0]) as client:
        yield client


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tables of a few rows."""
    monkeypatch.setattr(partition, "GRAIN", WIDTH)
    monkeypatch.setattr(partition, "SMALLEST_IN_BLOCKS", 1)


def hashed(capacity: int = CAPACITY, **options: Any) -> dict[str, Table]:
    named = {"uniform_bound": 0.5, "seed": 11, "hashed": True} | options
    return {"words": Table((capacity, WIDTH), "row_counter", **named), "items": Table((9, 2), "torch_sparse")}


def drawn(step: int) -> dict[str, Rows]:
    """Draw gradients of a few bits, whose sums are exact."""
    rng = np.random.default_rng(step)
    ids, items = rng.choice(POOL, 9), rng.integers(0, 9, 4)
    return {
        "words": Rows(ids, rng.integers(-9, 10, (9, WIDTH)).astype(np.float32)),
        "items": Rows(items, rng.integers(-9, 10, (4, 2)).astype(np.float32)),
    }


def plain(found: Any) -> Any:
    return {name: (each.indices.tolist(), each.values.tolist()) for name, each in found.items()}


def shard_of(ids: Any, capacity: int, bounds: list[int]) -> list[int]:
    """Return the shard of each id, in integers."""
    found = []
    for each in ids:
        mixed = (int(each) * 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93) % 2**64
        found.append(sum(((mixed >> 32) * capacity >> 32) >= bound for bound in bounds))
    return found


@pytest.mark.parametrize("policy", ["reject", "allow"])
def test_rows_by_ids_have_the_bits_of_one_server(one: stepwire.Client, many: stepwire.Client, policy: Any) -> None:
    shared: dict[str, Any] = {"optimizer": ADAM, "non_finite": policy}
    with one.create_session(hashed(), **shared) as whole, many.create_session(hashed(), **shared) as cut:
        assert len(cut.shards) == 3
        for step in range(4):
            assert plain(cut.step(drawn(step))) == plain(whole.step(drawn(step)))
        asked = {"words": np.concatenate([POOL[::-1], [7, 7]]), "items": [8, 0]}
        assert plain(cut.pull(rows=asked)) == plain(whole.pull(rows=asked))
        again = many.session(cut.session_id)
        assert again.shapes == whole.shapes
        again.attach(take_over=True)
        assert plain(again.step(drawn(4))) == plain(whole.step(drawn(4)))
        use = [info.tables for info in (cut.info(), whole.info())]
        assert use[0] == use[1] and use[0][0].rows == len(
            np.unique(np.concatenate([np.r_[drawn(k)["words"].indices] for k in range(5)]))
        )


def test_a_hash_of_the_id_chooses_the_server(many: stepwire.Client) -> None:
    with many.create_session(hashed()) as cut:
        cut.step(
            {
                "words": Rows(POOL, np.ones((len(POOL), WIDTH), np.float32)),
                "items": Rows([], np.ones((0, 2), np.float32)),
            }
        )
        rows = [next((each.rows for each in shard.info().tables), 0) for shard in cut.shards]
        capacities = [
            next((shape[0] for name, shape in shard.shapes.items() if "words" in name), 0) for shard in cut.shards
        ]
        expected = shard_of(POOL, CAPACITY, np.cumsum(capacities)[:-1].tolist())
        assert sum(capacities) == CAPACITY
        assert rows == [expected.count(rank) for rank in range(3)]
    ids = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    counts = np.bincount(numbers_of_ids(ids, 10).astype(np.int64), minlength=10)
    assert counts.sum() == 20_000 and abs(counts - 2000).max() < 300


@pytest.mark.parametrize("policy", ["reject", "allow"])
def test_a_full_server_refuses_the_step_for_all(many: stepwire.Client, policy: Any) -> None:
    """No shard has applied it, and another step follows."""
    with many.create_session(hashed(6), optimizer=ADAM, non_finite=policy) as cut:
        full = {"words": Rows(POOL, np.ones((len(POOL), WIDTH), np.float32)), "items": drawn(0)["items"]}
        before = plain(cut.pull(rows={"items": np.arange(9), "words": POOL}))
        with pytest.raises(
            stepwire.ResourceExhaustedError, match="ids are new; create the session with a larger table"
        ) as told:
            cut.step(full)
        assert told.value.reason is stepwire.Reason.TABLE_FULL and "'words'" in str(told.value)
        assert [shard.info().applied_step for shard in cut.shards] == [0, 0, 0]
        assert plain(cut.pull(rows={"items": np.arange(9), "words": POOL})) == before
        cut.step({"words": Rows(POOL[:1], np.ones((1, WIDTH), np.float32)), "items": drawn(0)["items"]})
        assert cut.applied_step == 1 and cut.info().tables[0].rows == 1


@pytest.mark.parametrize("applied", [False, True])
def test_a_reply_that_a_shard_lost_comes_again(one: stepwire.Client, many: stepwire.Client, applied: bool) -> None:
    with one.create_session(hashed(), optimizer=ADAM) as whole, many.create_session(hashed(), optimizer=ADAM) as cut:
        link: Any = cut._link.shards[1]  # type: ignore[attr-defined]
        for step in range(3):
            with (
                lost_replies(applied=applied, of=lambda hold: hold is link.hold),
                pytest.raises(stepwire.StepwireError),
            ):
                cut.step(drawn(step), timeout=5.0)
            assert plain(cut.step(drawn(step))) == plain(whole.step(drawn(step)))


def test_ids_that_several_servers_cannot_have_are_refused(
    many: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "GRAIN", 65_536)
    for mode in ("sync", "async"):
        with pytest.raises(stepwire.UnsupportedFeatureError, match="several workers have on one server, and several"):
            many.create_session(hashed(), aggregation=stepwire.Aggregation(workers=2, mode=mode), worker=0)
    with pytest.raises(stepwire.UnsupportedFeatureError, match="a capacity of 4294967296 ids"):
        many.create_session({"t": Table((2**32, 4), hashed=True)})
